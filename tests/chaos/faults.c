/* Loaded before libc: calls on chosen files fail, and the clock jumps, as the process itself asks by `fault_*`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static char part[256];            /* of the paths that are hit */
static int number, writes;        /* errno; whether calls that write fail, or those that read */
static int after, times;          /* calls that succeed first, and calls that fail then */
static int hits = -1;             /* a file that gets a byte for each failure */
static long seconds, from;        /* that the clock is off, from this time of the monotonic one on */

static time_t monotonic(void) {
  struct timespec now;
  syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
  return now.tv_sec;
}

void fault_hits(const char *path) { hits = syscall(SYS_open, path, O_CREAT | O_WRONLY | O_APPEND, 0600); }
void fault_file(const char *in_path, int error, int of_writes, int calls_before, int calls) {
  strncpy(part, in_path, sizeof part - 1);
  number = error, writes = of_writes, after = calls_before, times = calls;
}
void fault_clock(long off, long later) { seconds = off, from = monotonic() + later; }
static long off(void) { return seconds && monotonic() >= from ? seconds : 0; }

static int fails(const char *path, int write) {
  if (times <= 0 || write != writes || !path || !strstr(path, part)) return 0;
  if (__atomic_sub_fetch(&after, 1, __ATOMIC_SEQ_CST) >= 0) return 0;
  if (__atomic_sub_fetch(&times, 1, __ATOMIC_SEQ_CST) < 0) return 0;
  syscall(SYS_write, hits, "x", 1);
  errno = number;
  return 1;
}
static int fd_fails(int fd, int write) {
  char link[64], path[512];
  if (times <= 0) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return fails(path, write);
}

#define REAL(name) \
  static typeof(&name) real; \
  if (!real) real = (typeof(&name))dlsym(RTLD_NEXT, #name)
#define ON_FD(type, name, write, parameters, ...) \
  type name parameters { REAL(name); return fd_fails(fd, write) ? -1 : real(__VA_ARGS__); }
#define OPEN(name, parameters, ...) \
  int name parameters { \
    va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); \
    REAL(name); \
    return fails(path, (flags & O_ACCMODE) != O_RDONLY) ? -1 : real(__VA_ARGS__, mode); }

ON_FD(ssize_t, write, 1, (int fd, const void *data, size_t size), fd, data, size)
ON_FD(ssize_t, pwrite, 1, (int fd, const void *data, size_t size, off_t at), fd, data, size, at)
ON_FD(ssize_t, pwrite64, 1, (int fd, const void *data, size_t size, off64_t at), fd, data, size, at)
ON_FD(int, fsync, 1, (int fd), fd)
ON_FD(ssize_t, read, 0, (int fd, void *data, size_t size), fd, data, size)
ON_FD(ssize_t, pread, 0, (int fd, void *data, size_t size, off_t at), fd, data, size, at)
ON_FD(ssize_t, pread64, 0, (int fd, void *data, size_t size, off64_t at), fd, data, size, at)
OPEN(open, (const char *path, int flags, ...), path, flags)
OPEN(open64, (const char *path, int flags, ...), path, flags)
OPEN(openat, (int at, const char *path, int flags, ...), at, path, flags)
OPEN(openat64, (int at, const char *path, int flags, ...), at, path, flags)

int mkdir(const char *path, mode_t mode) {
  REAL(mkdir);
  return fails(path, 1) ? -1 : real(path, mode);
}
int rename(const char *from, const char *to) {
  REAL(rename);
  return fails(to, 1) ? -1 : real(from, to);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
  REAL(clock_gettime);
  int status = real(clock, now);
  if (clock == CLOCK_REALTIME) now->tv_sec += off();
  return status;
}
time_t time(time_t *now) {
  REAL(time);
  time_t shown = real(NULL) + off();
  return now ? (*now = shown) : shown;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  REAL(gettimeofday);
  int status = real(now, zone);
  now->tv_sec += off();
  return status;
}
