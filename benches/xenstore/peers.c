/* A hypervisor that is not there: lets Debian's xenstored and oxenstored run with no domain but their own, to compare with.
 *
 *   cc -O2 -shared -fPIC -o peers.so peers.c        and LD_PRELOAD=peers.so
 *
 * PEER_DIR   directory with the files "ring" (one page: dom0's ring, nobody at it) and "port", which stand for those of /proc/xen
 * PEER_SOCKET   where to bind the socket whose path oxenstored has built in
 *
 * The functions stand in for those of libxenevtchn, libxengnttab and libxenctrl (xen-project/xen tools/libs, as of 4.17), as far as the two
 * servers call them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

/* What every handle points to. */
static int handle;

static void *next(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}

/* Files: those of /proc/xen are in PEER_DIR. */

static int open_redirected(const char *path, int flags, mode_t mode)
{
    static int (*real)(const char *, int, ...);
    const char *name = !strcmp(path, "/proc/xen/xsd_kva") ? "ring" : !strcmp(path, "/proc/xen/xsd_port") ? "port" : NULL;
    char redirected[4096];

    if (!real)
        real = next("open");
    if (name) {
        snprintf(redirected, sizeof redirected, "%s/%s", getenv("PEER_DIR"), name);
        path = redirected;
    }
    return real(path, flags, mode);
}

static mode_t mode_of(int flags, va_list arguments)
{
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
}

int open(const char *path, int flags, ...)
{
    va_list arguments;

    va_start(arguments, flags);
    mode_t mode = mode_of(flags, arguments);
    va_end(arguments);
    return open_redirected(path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list arguments;

    va_start(arguments, flags);
    mode_t mode = mode_of(flags, arguments);
    va_end(arguments);
    return open_redirected(path, flags, mode);
}

int bind(int fd, const struct sockaddr *address, socklen_t length)
{
    static int (*real)(int, const struct sockaddr *, socklen_t);
    const char *path = getenv("PEER_SOCKET");
    struct sockaddr_un redirected = { .sun_family = AF_UNIX };

    if (!real)
        real = next("bind");
    if (path && address->sa_family == AF_UNIX) {
        strncpy(redirected.sun_path, path, sizeof redirected.sun_path - 1);
        address = (const struct sockaddr *)&redirected;
        length = sizeof redirected;
    }
    return real(fd, address, length);
}

/* Both raise their limits and end if they may not. */

int setrlimit(__rlimit_resource_t resource, const struct rlimit *limit)
{
    (void)resource, (void)limit;
    return 0;
}

int setrlimit64(__rlimit_resource_t resource, const struct rlimit64 *limit)
{
    (void)resource, (void)limit;
    return 0;
}

/* Event channels: none ever fires. */

static int event_fd = -1;

void *xenevtchn_open(void *logger, unsigned flags)
{
    (void)logger, (void)flags;
    event_fd = eventfd(0, EFD_NONBLOCK);
    return event_fd < 0 ? NULL : &handle;
}

void *xenevtchn_fdopen(void *logger, int fd, unsigned flags)
{
    (void)logger, (void)flags;
    event_fd = fd;
    return &handle;
}

int xenevtchn_close(void *xce) { (void)xce; return 0; }
int xenevtchn_fd(void *xce) { (void)xce; return event_fd; }
int xenevtchn_bind_virq(void *xce, unsigned virq) { (void)xce, (void)virq; return 1; }
int xenevtchn_bind_interdomain(void *xce, uint32_t domain, uint32_t port) { (void)xce, (void)domain, (void)port; return 2; }
int xenevtchn_unbind(void *xce, uint32_t port) { (void)xce, (void)port; return 0; }
int xenevtchn_unmask(void *xce, uint32_t port) { (void)xce, (void)port; return 0; }
int xenevtchn_notify(void *xce, uint32_t port) { (void)xce, (void)port; return 0; }
int xenevtchn_pending(void *xce) { (void)xce; errno = EAGAIN; return -1; }

/* Rings: a page of nobody's. */

static void *page(void)
{
    void *mapped = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return mapped == MAP_FAILED ? NULL : mapped;
}

void *xengnttab_open(void *logger, unsigned flags) { (void)logger, (void)flags; return &handle; }
int xengnttab_close(void *xgt) { (void)xgt; return 0; }
int xengnttab_set_max_grants(void *xgt, uint32_t count) { (void)xgt, (void)count; return 0; }
int xengnttab_unmap(void *xgt, void *start, uint32_t count) { (void)xgt; return munmap(start, 4096 * (size_t)count); }

void *xengnttab_map_grant_ref(void *xgt, uint32_t domain, uint32_t ref, int prot)
{
    (void)xgt, (void)domain, (void)ref, (void)prot;
    return page();
}

void *xc_map_foreign_range(void *xch, uint32_t domain, int size, int prot, unsigned long frame)
{
    (void)xch, (void)domain, (void)size, (void)prot, (void)frame;
    return page();
}

/* Domains: 0 alone, running. Both structures begin with its number and flags, of which running is no bit. */

void *xc_interface_open(void *logger, void *dombuild_logger, unsigned flags)
{
    (void)logger, (void)dombuild_logger, (void)flags;
    return &handle;
}

int xc_interface_close(void *xch) { (void)xch; return 0; }

int xc_domain_getinfo(void *xch, uint32_t first, unsigned count, void *info)
{
    (void)xch, (void)count;
    if (first != 0)
        return 0;
    memset(info, 0, 12);
    return 1;
}

int xc_domain_getinfolist(void *xch, uint32_t first, unsigned count, void *info)
{
    (void)xch, (void)count;
    if (first != 0)
        return 0;
    memset(info, 0, 8);
    return 1;
}
