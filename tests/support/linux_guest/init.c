/* Process 1 of the little Linux guest. It verifies and rewrites a part of its memory and its whole disk for ever, and
 * prints a line of its state to the console several times a second. A line "reboot" from the console restarts it. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#include <linux/rtc.h>

enum { PAGE = 4096, WORDS = PAGE / 8, CHUNK = 16384, CHUNKS = 128, TOUCHES = 400, ROUNDS = 4 };

static uint64_t *memory;
static uint64_t *memory_generation;
static size_t pages;
static uint64_t touched, memory_wrong, disk_checked, disk_wrong, disk_errors, generation;
static uint64_t disk_generation[CHUNKS];
static char *chunk;
static int disk = -1, rng = -1, rtc = -1;

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
    x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
    return x ^ x >> 33;
}

static uint64_t random_word(void)
{
    static uint64_t state = 88172645463325252ull;
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

static double clock_s(clockid_t which)
{
    struct timespec now;
    clock_gettime(which, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

/* A module whose dependencies are not there yet is tried again in the next round. */
static void load_modules(void)
{
    char name[128], path[160];
    for (int round = 1; round <= ROUNDS; round++) {
        FILE *names = fopen("/modules/names", "r");
        while (names && fscanf(names, "%127s", name) == 1) {
            snprintf(path, sizeof path, "/modules/%s", name);
            int module = open(path, O_RDONLY);
            if (syscall(SYS_finit_module, module, "", 0) && errno != EEXIST && round == ROUNDS)
                printf("MODULE %s: %m\n", name);
            close(module);
        }
        fclose(names);
    }
}

static void set_address(const char *link, const char *address)
{
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    struct ifreq request = {0};
    struct sockaddr_in *to = (struct sockaddr_in *)&request.ifr_addr;
    snprintf(request.ifr_name, IFNAMSIZ, "%s", link);
    to->sin_family = AF_INET;
    inet_pton(AF_INET, address, &to->sin_addr);
    if (ioctl(fd, SIOCSIFADDR, &request))
        printf("NETWORK %m\n");
    inet_pton(AF_INET, "255.255.255.0", &to->sin_addr);
    ioctl(fd, SIOCSIFNETMASK, &request);
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    ioctl(fd, SIOCSIFFLAGS, &request);
    close(fd);
}

static void fill_memory(void)
{
    long total_kib = 0;
    FILE *info = fopen("/proc/meminfo", "r");
    if (info && fscanf(info, "MemTotal: %ld", &total_kib) == 1)
        pages = total_kib / 4 / 4;
    memory = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memory_generation = calloc(pages, 8);
    for (size_t word = 0; word < pages * WORDS; word++)
        memory[word] = mix(word);
}

static void touch_memory(void)
{
    size_t page = random_word() % pages;
    uint64_t *words = memory + page * WORDS;
    for (int i = 0; i < WORDS; i += 8)
        if (words[i] != (mix(page * WORDS + i) ^ memory_generation[page])) {
            memory_wrong++;
            break;
        }
    if (touched++ % 4)
        return;
    memory_generation[page] = mix(touched);
    for (int i = 0; i < WORDS; i++)
        words[i] = mix(page * WORDS + i) ^ memory_generation[page];
}

static uint64_t disk_word(unsigned place, unsigned word)
{
    return mix(place * (CHUNK / 8) + word) ^ disk_generation[place];
}

static void check_disk(void)
{
    unsigned place = random_word() % CHUNKS;
    uint64_t *words = (uint64_t *)chunk;
    if (disk_generation[place]) {
        memset(chunk, 0, CHUNK);
        if (pread(disk, chunk, CHUNK, (off_t)place * CHUNK) != CHUNK)
            disk_errors++;
        disk_checked++;
        for (unsigned i = 0; i < CHUNK / 8; i++)
            if (words[i] != disk_word(place, i)) {
                disk_wrong++;
                break;
            }
    }
    disk_generation[place] = mix(++generation);
    for (unsigned i = 0; i < CHUNK / 8; i++)
        words[i] = disk_word(place, i);
    if (pwrite(disk, chunk, CHUNK, (off_t)place * CHUNK) != CHUNK)
        disk_errors++;
}

static long long rtc_s(void)
{
    struct rtc_time at = {0};
    if (rtc < 0 || ioctl(rtc, RTC_RD_TIME, &at))
        return 0;
    struct tm utc = {.tm_sec = at.tm_sec, .tm_min = at.tm_min, .tm_hour = at.tm_hour, .tm_mday = at.tm_mday,
                     .tm_mon = at.tm_mon, .tm_year = at.tm_year};
    return timegm(&utc);
}

static void say_state(const char *boot)
{
    static unsigned long random_bytes;
    char bytes[16];
    ssize_t got = rng < 0 ? 0 : read(rng, bytes, sizeof bytes);
    random_bytes += got > 0 ? got : 0;
    printf("ALIVE boot=%.8s touched=%lu wrong=%lu disk=%lu disk_wrong=%lu disk_errors=%lu random=%lu clock=%.3f "
           "rtc=%lld uptime=%.3f\n",
           boot, touched, memory_wrong, disk_checked, disk_wrong, disk_errors, random_bytes,
           clock_s(CLOCK_REALTIME), rtc_s(), clock_s(CLOCK_MONOTONIC));
}

static void take_orders(void)
{
    static char line[64];
    static size_t length;
    char byte;
    while (read(0, &byte, 1) == 1) {
        if (byte != '\n') {
            line[length] = byte;
            length = (length + 1) % (sizeof line - 1);
            continue;
        }
        line[length] = 0;
        length = 0;
        printf("HEARD %s\n", line);
        if (!strcmp(line, "reboot"))
            reboot(RB_AUTOBOOT);
    }
}

int main(void)
{
    char boot[64] = "?";
    const char *places[][2] = {{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"}};
    for (int i = 0; i < 3; i++) {
        mkdir(places[i][0], 0755);
        mount(places[i][1], places[i][0], places[i][1], 0, 0);
    }
    int console = open("/dev/ttyS0", O_RDWR | O_NONBLOCK);
    struct termios raw;
    tcgetattr(console, &raw);
    cfmakeraw(&raw);
    tcsetattr(console, TCSANOW, &raw);
    dup2(console, 0);
    int output = open("/dev/ttyS0", O_WRONLY);
    dup2(output, 1);
    dup2(output, 2);
    setvbuf(stdout, 0, _IOLBF, 0);
    load_modules();
    FILE *id = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (id && fscanf(id, "%63s", boot) != 1)
        boot[0] = '?';
    set_address("eth0", ADDRESS);
    disk = open("/dev/vda", O_RDWR | O_DIRECT);
    rng = open("/dev/hwrng", O_RDONLY | O_NONBLOCK);
    rtc = open("/dev/rtc0", O_RDONLY);
    chunk = mmap(0, CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fill_memory();
    printf("FILLED %zu pages, disk %d, rng %d, rtc %d\n", pages, disk, rng, rtc);
    for (double said = 0;;) {
        for (int i = 0; i < TOUCHES; i++)
            touch_memory();
        check_disk();
        take_orders();
        if (clock_s(CLOCK_MONOTONIC) - said > 0.25) {
            said = clock_s(CLOCK_MONOTONIC);
            say_state(boot);
        }
    }
}
