/*
 * launch COUNT PROGRAM ARGUMENT...: runs a program many times, one after the other, and prints the milliseconds that each took, from
 * before it was started until it was gone.
 */
#include <err.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>

extern char **environ;

int
main(int argc, char *argv[])
{
	posix_spawn_file_actions_t	 actions;
	struct timespec			 begin, end;
	int				 count = atoi(argv[1]), status;
	pid_t				 child;

	if (argc < 3 || count < 1)
		errx(1, "usage: launch COUNT PROGRAM ARGUMENT...");
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
	clock_gettime(CLOCK_MONOTONIC, &begin);
	for (int i = 0; i < count; i++) {
		if (posix_spawn(&child, argv[2], &actions, NULL, argv + 2, environ) != 0)
			errx(1, "%s does not start", argv[2]);
		if (waitpid(child, &status, 0) == -1 || status != 0)
			errx(1, "%s failed: %#x", argv[2], status);
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%.3f\n", ((end.tv_sec - begin.tv_sec) * 1e3 + (end.tv_nsec - begin.tv_nsec) / 1e6) / count);
	return 0;
}
