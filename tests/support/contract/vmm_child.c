/* A VMM in a process of its own, as far as a destination's pager sees one: it owns guest memory and a userfaultfd, hands
 * both over, and touches pages. It is C because Python cannot touch registered memory without holding its own lock.
 *
 * Arguments: anon|shmem|hugetlb|hugefile, number of pages, userfaultfd features (hexadecimal), and from which page on
 * memory is registered with a second userfaultfd. Says `ready HVA` and then obeys, a line each, on standard input; PAGE
 * counts pieces of 4 KiB:
 *
 *   send SOCKET LETTERS LENGTH   connects and sends the LENGTH bytes that follow in one sendmsg, with a descriptor a
 *                                letter: u userfaultfd, v the second, m memfd, p its own pidfd, n none of these, - none
 *   touch ID PAGE                in a thread of its own: `touching ID THREAD`, then `touched ID byte:N|mixed|sigbus`
 *   advise ID PAGE dontneed|remove|replace   in a thread of its own: madvise, or a new mapping of the same kind in the
 *                                place of the page; then `advised ID 0|ERRNO`
 *
 * Whatever comes on the socket is said as `frame JSON`, its end as `closed`. A touch that ended says first what had
 * come before it ended: the order of the lines is the order in the VMM. The end of standard input ends the process. */
#include "facts.h"
#include <sys/un.h>

#define MOST_DESCRIPTORS 128
#define LONGEST_FRAME (64 << 10)

static struct memory memory;
static int uffd, second;

/* Held while a line is said and while the connection is read. */
static pthread_mutex_t saying = PTHREAD_MUTEX_INITIALIZER;
static int connection = -1;
static unsigned char inbox[4 + LONGEST_FRAME];
static size_t have;

static void say_frames(void)
{
	for (;;) {
		size_t length = (size_t)inbox[0] << 24 | inbox[1] << 16 | inbox[2] << 8 | inbox[3];
		if (have < 4 || have < 4 + length)
			return;
		printf("frame %.*s\n", (int)length, inbox + 4);
		have -= 4 + length;
		memmove(inbox, inbox + 4 + length, have);
	}
}

/* Says what has come so far. `saying` is held. */
static void say_what_came(void)
{
	while (connection >= 0) {
		ssize_t count = recv(connection, inbox + have, sizeof inbox - have, MSG_DONTWAIT);
		if (count < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (count <= 0) {
			puts("closed");
			connection = -1; /* its reader closes it */
			return;
		}
		have += count;
		say_frames();
	}
}

static void *read_connection(void *argument)
{
	int mine = (int)(intptr_t)argument, over = 0;
	while (!over) {
		event_waits(mine, -1);
		pthread_mutex_lock(&saying);
		if (connection == mine)
			say_what_came();
		over = connection != mine;
		pthread_mutex_unlock(&saying);
	}
	close(mine);
	return NULL;
}

static void run_thread(void *(*work)(void *), void *argument)
{
	pthread_t thread;
	NEED(!pthread_create(&thread, NULL, work, argument));
	NEED(!pthread_detach(thread));
}

static int descriptor_of(char letter)
{
	static int neither = -1, own = -1;
	if (letter == 'u')
		return uffd;
	if (letter == 'v')
		return second;
	if (letter == 'm')
		return memory.memfd;
	if (letter == 'p')
		return own < 0 ? own = syscall(SYS_pidfd_open, getpid(), 0) : own;
	if (neither < 0)
		neither = open("/dev/null", O_RDWR | O_CLOEXEC);
	return neither;
}

static void send_message(int to, const char *letters, char *body, size_t length)
{
	union {
		char bytes[CMSG_SPACE(MOST_DESCRIPTORS * sizeof(int))];
		struct cmsghdr align;
	} control = {0};
	struct iovec content = {body, length};
	struct msghdr message = {.msg_iov = &content, .msg_iovlen = 1};
	size_t count = *letters == '-' ? 0 : strlen(letters);
	NEED(count <= MOST_DESCRIPTORS);
	if (count) {
		message.msg_control = control.bytes;
		message.msg_controllen = CMSG_SPACE(count * sizeof(int));
		struct cmsghdr *header = CMSG_FIRSTHDR(&message);
		*header = (struct cmsghdr){CMSG_LEN(count * sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
		for (size_t i = 0; i < count; i++)
			((int *)CMSG_DATA(header))[i] = descriptor_of(letters[i]);
	}
	NEED(sendmsg(to, &message, MSG_NOSIGNAL) == (ssize_t)length);
}

static void attach(const char *arguments)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	char letters[MOST_DESCRIPTORS + 1];
	size_t length;
	NEED(sscanf(arguments, "%107s %128s %zu", address.sun_path, letters, &length) == 3);
	char *body = malloc(length);
	NEED(body && fread(body, 1, length, stdin) == length);
	int to = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	NEED(to >= 0 && !connect(to, (struct sockaddr *)&address, sizeof address));
	pthread_mutex_lock(&saying);
	NEED(connection < 0);
	connection = to;
	have = 0;
	pthread_mutex_unlock(&saying);
	send_message(to, letters, body, length);
	free(body);
	run_thread(read_connection, (void *)(intptr_t)to);
}

/* In the place of an advice. */
#define REPLACE -1

struct act {
	long id;
	char *at;
	int advice;
};

/* facts.h has one return point for the whole process; here several threads touch. */
static _Thread_local sigjmp_buf thread_return;

static void on_thread_sigbus(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	/* The host found a bad frame that no thread has touched. */
	if (info->si_code == BUS_MCEERR_AO)
		return;
	siglongjmp(thread_return, 1);
}

static void say_content(const unsigned char *page, char *result, size_t size)
{
	for (size_t i = 1; i < PAGE; i++) {
		if (page[i] != page[0]) {
			snprintf(result, size, "mixed");
			return;
		}
	}
	snprintf(result, size, "byte:%d", page[0]);
}

static void *touch_page(void *argument)
{
	struct act *act = argument;
	char result[16] = "sigbus";
	pthread_mutex_lock(&saying);
	printf("touching %ld %ld\n", act->id, syscall(SYS_gettid));
	pthread_mutex_unlock(&saying);
	if (!sigsetjmp(thread_return, 1)) {
		(void)*(volatile char *)act->at;
		say_content((unsigned char *)act->at, result, sizeof result);
	}
	pthread_mutex_lock(&saying);
	say_what_came();
	printf("touched %ld %s\n", act->id, result);
	pthread_mutex_unlock(&saying);
	free(act);
	return NULL;
}

static int map_again(char *at)
{
	int flags = MAP_FIXED | (memory.memfd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
	return mmap(at, memory.page, PROT_READ | PROT_WRITE, flags, memory.memfd, memory.memfd < 0 ? 0 : at - memory.at) == MAP_FAILED;
}

static void *advise_page(void *argument)
{
	struct act *act = argument;
	char *page = act->at - (act->at - memory.at) % memory.page;
	int done = act->advice == REPLACE ? map_again(page) : madvise(page, memory.page, act->advice);
	int error = done ? errno : 0;
	pthread_mutex_lock(&saying);
	printf("advised %ld %s\n", act->id, name_of(error));
	pthread_mutex_unlock(&saying);
	free(act);
	return NULL;
}

static void start_act(const char *line, const char *verb, void *(*work)(void *))
{
	struct act *act = malloc(sizeof *act);
	size_t page;
	char advice[16] = "";
	NEED(act && sscanf(line + strlen(verb), "%ld %zu %15s", &act->id, &page, advice) >= 2);
	NEED(page * PAGE < memory.pages * memory.page);
	act->at = memory.at + page * PAGE;
	act->advice = !strcmp(advice, "replace") ? REPLACE : strcmp(advice, "remove") ? MADV_DONTNEED : MADV_REMOVE;
	run_thread(work, act);
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	NEED(argc == 5);
	struct sigaction action = {.sa_sigaction = on_thread_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART};
	NEED(!sigaction(SIGBUS, &action, NULL));
	memory = map_memory(argv[1], strtoul(argv[2], NULL, 10));
	uffd = open_uffd(0, strtoull(argv[3], NULL, 16));
	second = open_uffd(0, strtoull(argv[3], NULL, 16));
	struct memory first = memory, rest = memory;
	first.pages = strtoul(argv[4], NULL, 10);
	rest.at += first.pages * PAGE;
	rest.pages -= first.pages;
	register_memory(uffd, first, UFFDIO_REGISTER_MODE_MISSING);
	if (rest.pages)
		register_memory(second, rest, UFFDIO_REGISTER_MODE_MISSING);
	printf("ready %lu\n", (unsigned long)memory.at);
	char line[512];
	while (fgets(line, sizeof line, stdin)) {
		if (!strncmp(line, "send ", 5))
			attach(line + 5);
		else if (!strncmp(line, "touch ", 6))
			start_act(line, "touch ", touch_page);
		else if (!strncmp(line, "advise ", 7))
			start_act(line, "advise ", advise_page);
		else
			NEED(!"a known command");
	}
	return 0;
}
