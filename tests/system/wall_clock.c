/* Stands before the C library's wall clock, so that a test can set that of one process.
 *
 * WALL_CLOCK names a file that holds one number: microseconds to add to the machine's time. It is mapped, so that what
 * the test writes there counts at once. Clocks that measure intervals are left alone, as when somebody sets a real one.
 *
 * The kernel, which ends waits, still has the machine's time, so an absolute time to wait until is put back into it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <threads.h>
#include <time.h>

static volatile int64_t *ahead_us;
static int (*real_clock_gettime)(clockid_t, struct timespec *);
static int (*real_cnd_timedwait)(cnd_t *, mtx_t *, const struct timespec *);

__attribute__((constructor)) static void begin(void) {
    int file = open(getenv("WALL_CLOCK"), O_RDONLY);
    void *mapped = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    real_cnd_timedwait = dlsym(RTLD_NEXT, "cnd_timedwait");
    if (file < 0 || mapped == MAP_FAILED || !real_clock_gettime || !real_cnd_timedwait) abort();
    ahead_us = mapped;
}

static struct timespec moved(struct timespec time, int64_t by_us) {
    int64_t ns = time.tv_nsec + by_us % 1000000 * 1000;
    time.tv_sec += by_us / 1000000 + (ns < 0 ? -1 : ns / 1000000000);
    time.tv_nsec = ns < 0 ? ns + 1000000000 : ns % 1000000000;
    return time;
}

int clock_gettime(clockid_t id, struct timespec *time) {
    int failed = real_clock_gettime(id, time);
    if (!failed && id == CLOCK_REALTIME) *time = moved(*time, *ahead_us);
    return failed;
}

int gettimeofday(struct timeval *time, void *zone) {
    struct timespec now;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where) {
    struct timespec now = {0};
    clock_gettime(CLOCK_REALTIME, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}

/* What librdkafka waits with; Rust waits by the monotonic clock. */
int cnd_timedwait(cnd_t *condition, mtx_t *mutex, const struct timespec *until) {
    struct timespec real = moved(*until, -*ahead_us);
    return real_cnd_timedwait(condition, mutex, &real);
}
