/*
 * A program that knows pvbus(4): type DEVICE | read DEVICE KEY BYTES | write DEVICE KEY VALUE MODE | wild DEVICE | other DEVICE.
 * Prints the answer, or the error.
 */
#include <dev/pv/pvvar.h>
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int
main(int argc, char *argv[])
{
	struct pvbus_req	 pvr;
	char			 key[4096] = "", *value;
	size_t			 size = 4096;
	int			 fd, writing = !strcmp(argv[1], "write");
	unsigned long		 command = writing ? PVBUSIOC_KVWRITE : PVBUSIOC_KVREAD;

	if (argc > 4 && !writing)
		size = strtoul(argv[4], NULL, 10);
	value = calloc(1, size + 1);
	if (argc > 3)
		strcpy(key, argv[3]);
	if (writing)
		strcpy(value, argv[4]);
	if (!strcmp(argv[1], "type"))
		command = PVBUSIOC_TYPE;
	if (!strcmp(argv[1], "other"))
		command = _IOWR('V', 9, struct pvbus_req);
	if ((fd = open(argv[2], writing && !strcmp(argv[5], "rw") ? O_RDWR : O_RDONLY)) == -1)
		err(1, "open");
	pvr = (struct pvbus_req){ sizeof(key), key, size, value };
	if (!strcmp(argv[1], "wild"))
		pvr.pvr_key = (char *)16;
	if (ioctl(fd, command, &pvr, sizeof(pvr)) == -1)
		err(1, "ioctl");
	printf("%s\n", command == PVBUSIOC_TYPE ? key : value);
	return 0;
}
