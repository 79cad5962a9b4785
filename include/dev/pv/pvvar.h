/*
 * The ioctls of pvbus(4), for programs on Linux: `hostctl serve` makes the devices /dev/pvbus0, /dev/pvbus1 and so on.
 *
 * Commands, structure and limits are OpenBSD's (sys/dev/pv/pvvar.h), so that its programs compile unchanged: put the directory above
 * dev/ into the compiler's search path. Keys and values are strings that end with a NUL; the lengths are those of the buffers.
 */
#ifndef _DEV_PV_PVVAR_H_
#define _DEV_PV_PVVAR_H_

#include <stddef.h>
#include <sys/ioctl.h>

struct pvbus_req {
	size_t	 pvr_keylen;	/* bytes of the key's buffer */
	char	*pvr_key;
	size_t	 pvr_valuelen;	/* bytes of the value's buffer */
	char	*pvr_value;
};

/* Most bytes of a key or a value, with the NUL. */
#define PVBUS_KVOP_MAXSIZE	(64 * 1024)

/* The value of pvr_key into pvr_value; ERANGE when it does not fit. */
#define PVBUSIOC_KVREAD		_IOWR('V', 1, struct pvbus_req)
/* pvr_value becomes the value of pvr_key; EPERM unless opened for writing. */
#define PVBUSIOC_KVWRITE	_IOWR('V', 2, struct pvbus_req)
/* The interface's name into pvr_key. The header calls it TYPE, the manual page KVTYPE. */
#define PVBUSIOC_TYPE		_IOWR('V', 3, struct pvbus_req)
#define PVBUSIOC_KVTYPE		PVBUSIOC_TYPE

#endif /* _DEV_PV_PVVAR_H_ */
