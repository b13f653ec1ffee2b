/*
 * A network between two namespaces: a TUN device in each, and a thread a direction that carries packets from one to
 * the other as its conditions say. It exists because a kernel may lack sch_netem, and so that a run repeats: what is
 * lost, and what overtakes, follows from the seed and the number of the packet.
 *
 *   emulator SEED MTU  NAMESPACE ADDRESS/PREFIX  NAMESPACE ADDRESS/PREFIX
 *
 * Commands on standard input, a line each, answered by a line each. DIRECTION is "ab", "ba" or "both":
 *
 *   DIRECTION key=value ...   changes these conditions and no other
 *   stats                     counts of both directions
 *
 *   delay_us      each packet, one way
 *   jitter_us     up to so much more, in order
 *   loss_ppm      packets dropped, of a million
 *   reorder_ppm   packets that skip the delay and so overtake, of a million
 *   rate_bit_s    0: unlimited
 *   queue_bytes   what may wait for the rate; more is dropped
 *   largest       bytes of a packet that still passes; 0: any
 *   hole          1: nothing passes
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { LARGEST_PACKET = 65536, BATCH = 64, TIMER_SLACK_NS = 1000, NS_PER_US = 1000 };
static const uint64_t SECOND_NS = 1000000000, MILLION = 1000000;

struct conditions {
    uint64_t delay_us, jitter_us, loss_ppm, reorder_ppm, rate_bit_s, queue_bytes, largest, hole;
};

struct packet {
    uint64_t due_ns, number;
    size_t length;
    unsigned char *bytes;
};

struct direction {
    pthread_mutex_t lock; /* of conditions and counts */
    struct conditions conditions;
    uint64_t carried, carried_bytes, lost, overflowed;

    /* Of its thread alone. */
    int from, to;
    uint64_t random, number, rate_free_ns, last_due_ns;
    struct packet *heap; /* the one that is due first at the root */
    size_t count, room;
};

static struct direction directions[2]; /* a to b, b to a */

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * SECOND_NS + (uint64_t)time.tv_nsec;
}

/* xorshift64: the same sequence for the same seed on every machine. */
static uint64_t next_random(struct direction *d) {
    d->random ^= d->random << 13;
    d->random ^= d->random >> 7;
    d->random ^= d->random << 17;
    return d->random;
}

static int happens(struct direction *d, uint64_t ppm) {
    return next_random(d) % MILLION < ppm;
}

/* ---- packets on their way, by due time ---- */

static int before(const struct packet *a, const struct packet *b) {
    return a->due_ns != b->due_ns ? a->due_ns < b->due_ns : a->number < b->number;
}

static void put(struct direction *d, struct packet packet) {
    if (d->count == d->room) {
        d->room = d->room ? d->room * 2 : 1024;
        d->heap = realloc(d->heap, d->room * sizeof *d->heap);
        if (!d->heap)
            fail("realloc");
    }
    size_t at = d->count++;
    for (; at && before(&packet, &d->heap[(at - 1) / 2]); at = (at - 1) / 2)
        d->heap[at] = d->heap[(at - 1) / 2];
    d->heap[at] = packet;
}

static struct packet take(struct direction *d) {
    struct packet first = d->heap[0], last = d->heap[--d->count];
    size_t at = 0;
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= d->count)
            break;
        if (child + 1 < d->count && before(&d->heap[child + 1], &d->heap[child]))
            child++;
        if (!before(&d->heap[child], &last))
            break;
        d->heap[at] = d->heap[child];
        at = child;
    }
    d->heap[at] = last;
    return first;
}

/* ---- a direction ---- */

static struct conditions conditions_of(struct direction *d) {
    pthread_mutex_lock(&d->lock);
    struct conditions copy = d->conditions;
    pthread_mutex_unlock(&d->lock);
    return copy;
}

static void count(struct direction *d, uint64_t *counter, uint64_t bytes) {
    pthread_mutex_lock(&d->lock);
    ++*counter;
    d->carried_bytes += bytes;
    pthread_mutex_unlock(&d->lock);
}

static void deliver(struct direction *d, const unsigned char *bytes, size_t length) {
    struct pollfd room = {d->to, POLLOUT, 0};
    while (write(d->to, bytes, length) < 0) {
        if (errno != EAGAIN && errno != EINTR)
            return; /* the device is down */
        poll(&room, 1, 1);
    }
    count(d, &d->carried, length);
}

/* When the last bit of the packet has left the bottleneck; 0 if its queue is full. */
static uint64_t through_bottleneck(struct direction *d, const struct conditions *c, uint64_t now, size_t length) {
    if (!c->rate_bit_s)
        return now;
    uint64_t start = d->rate_free_ns > now ? d->rate_free_ns : now;
    double waiting = (double)(start - now) * (double)c->rate_bit_s / 8e9;
    if (waiting > (double)c->queue_bytes)
        return 0;
    d->rate_free_ns = start + (uint64_t)((double)length * 8e9 / (double)c->rate_bit_s);
    return d->rate_free_ns;
}

static void accept_packet(struct direction *d, const unsigned char *bytes, size_t length) {
    /* A new device sends IPv6 by itself, at any time: it would take the numbers of others. */
    if (bytes[0] >> 4 != 4)
        return;
    struct conditions c = conditions_of(d);
    uint64_t number = d->number++, now = now_ns();
    /* Drawn for every packet, so that a condition that changes shifts no draw of another. */
    int loses = happens(d, c.loss_ppm), overtakes = happens(d, c.reorder_ppm);
    uint64_t jitter_ns = next_random(d) % (c.jitter_us * NS_PER_US + 1);
    if (c.hole || loses || (c.largest && length > c.largest)) {
        count(d, &d->lost, 0);
        return;
    }
    uint64_t due = through_bottleneck(d, &c, now, length);
    if (!due) {
        count(d, &d->overflowed, 0);
        return;
    }
    if (!overtakes) {
        due += c.delay_us * NS_PER_US + jitter_ns;
        if (due < d->last_due_ns)
            due = d->last_due_ns;
        d->last_due_ns = due;
    }
    if (due <= now && !d->count) {
        deliver(d, bytes, length);
        return;
    }
    struct packet packet = {due, number, length, malloc(length)};
    if (!packet.bytes)
        fail("malloc");
    memcpy(packet.bytes, bytes, length);
    put(d, packet);
}

/* A hole takes what is on its way as well. */
static void deliver_due(struct direction *d) {
    while (d->count && d->heap[0].due_ns <= now_ns()) {
        struct packet packet = take(d);
        if (conditions_of(d).hole)
            count(d, &d->lost, 0);
        else
            deliver(d, packet.bytes, packet.length);
        free(packet.bytes);
    }
}

static void *carry(void *argument) {
    struct direction *d = argument;
    static _Thread_local unsigned char bytes[LARGEST_PACKET];
    prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS);
    for (;;) {
        deliver_due(d);
        int batch = 0;
        for (; batch < BATCH; batch++) {
            ssize_t length = read(d->from, bytes, sizeof bytes);
            if (length <= 0)
                break;
            accept_packet(d, bytes, (size_t)length);
        }
        if (batch == BATCH)
            continue;
        struct pollfd more = {d->from, POLLIN, 0};
        uint64_t now = now_ns(), left = d->count && d->heap[0].due_ns > now ? d->heap[0].due_ns - now : 0;
        struct timespec wait = {(time_t)(left / SECOND_NS), (long)(left % SECOND_NS)};
        ppoll(&more, 1, d->count ? &wait : NULL, NULL);
    }
    return NULL;
}

/* ---- devices and commands ---- */

static int tun_in(const char *namespace, const char *address, const char *mtu) {
    char path[256], command[512];
    snprintf(path, sizeof path, "/run/netns/%s", namespace);
    int entered = open(path, O_RDONLY | O_CLOEXEC);
    if (entered < 0 || setns(entered, CLONE_NEWNET) < 0)
        fail(path);
    close(entered);
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    struct ifreq request = {.ifr_name = "emulated", .ifr_flags = IFF_TUN | IFF_NO_PI};
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request) < 0)
        fail("/dev/net/tun");
    snprintf(command, sizeof command,
             "ip addr add %s dev emulated && ip link set emulated mtu %s txqueuelen 10000 up && ip link set lo up",
             address, mtu);
    if (system(command) != 0)
        fail(command);
    return fd;
}

static uint64_t *condition_named(struct conditions *c, const char *name) {
    const struct {
        const char *name;
        uint64_t *value;
    } all[] = {
        {"delay_us", &c->delay_us},     {"jitter_us", &c->jitter_us},     {"loss_ppm", &c->loss_ppm},
        {"reorder_ppm", &c->reorder_ppm}, {"rate_bit_s", &c->rate_bit_s}, {"queue_bytes", &c->queue_bytes},
        {"largest", &c->largest},       {"hole", &c->hole},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(name, all[i].name))
            return all[i].value;
    return NULL;
}

/* Returns NULL, or what is wrong. */
static const char *change(char *words) {
    char *rest, *which = strtok_r(words, " \n", &rest), *word;
    int first = which && !strcmp(which, "ba"), last = which && strcmp(which, "ab");
    if (!which || (strcmp(which, "ab") && strcmp(which, "ba") && strcmp(which, "both")))
        return "the direction is none of ab, ba, both";
    while ((word = strtok_r(NULL, " \n", &rest))) {
        char *value = strchr(word, '='), *end;
        if (!value)
            return "a condition without a value";
        *value++ = 0;
        uint64_t number = strtoull(value, &end, 10);
        if (*end || end == value)
            return "a value that is no number";
        for (int i = first; i <= last; i++) {
            struct direction *d = &directions[i];
            pthread_mutex_lock(&d->lock);
            uint64_t *condition = condition_named(&d->conditions, word);
            if (condition)
                *condition = number;
            pthread_mutex_unlock(&d->lock);
            if (!condition)
                return "an unknown condition";
        }
    }
    return NULL;
}

static void print_stats(void) {
    for (int i = 0; i < 2; i++) {
        struct direction *d = &directions[i];
        pthread_mutex_lock(&d->lock);
        printf("%s%s_carried=%lu %s_bytes=%lu %s_lost=%lu %s_overflowed=%lu", i ? " " : "", i ? "ba" : "ab", d->carried,
               i ? "ba" : "ab", d->carried_bytes, i ? "ba" : "ab", d->lost, i ? "ba" : "ab", d->overflowed);
        pthread_mutex_unlock(&d->lock);
    }
    puts("");
}

int main(int argc, char **argv) {
    if (argc != 7) {
        fprintf(stderr, "usage: emulator SEED MTU NAMESPACE ADDRESS/PREFIX NAMESPACE ADDRESS/PREFIX\n");
        return 2;
    }
    uint64_t seed = strtoull(argv[1], NULL, 10);
    int a = tun_in(argv[3], argv[4], argv[2]), b = tun_in(argv[5], argv[6], argv[2]);
    for (int i = 0; i < 2; i++) {
        struct direction *d = &directions[i];
        d->from = i ? b : a;
        d->to = i ? a : b;
        d->random = (seed + 1) * 0x9e3779b97f4a7c15 + (uint64_t)i; /* never 0 for a small seed */
        pthread_mutex_init(&d->lock, NULL);
        pthread_t thread;
        if (pthread_create(&thread, NULL, carry, d) != 0)
            fail("pthread_create");
    }
    puts("ready");
    fflush(stdout);
    char line[1024];
    while (fgets(line, sizeof line, stdin)) {
        if (!strncmp(line, "stats", 5)) {
            print_stats();
        } else {
            const char *wrong = change(line);
            puts(wrong ? wrong : "ok");
        }
        fflush(stdout);
    }
    return 0;
}
