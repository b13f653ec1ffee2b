/* Who keeps a userfaultfd alive, what happens to faults that nobody answers, and what events carry. */
#include "facts.h"

#define MISSING UFFDIO_REGISTER_MODE_MISSING

static void last_close(const char *backing)
{
	int uffd = open_uffd(0, 0);
	struct memory memory = map_memory(backing, 8);
	register_memory(uffd, memory, MISSING);
	NEED(!close(uffd));
	say_touch("touch", memory.at + PAGE);
}

static void second_descriptor(const char *backing)
{
	int uffd = open_uffd(0, 0);
	struct memory memory = map_memory(backing, 8);
	register_memory(uffd, memory, MISSING);
	int kept = dup(uffd);
	NEED(kept >= 0 && !close(uffd));
	struct toucher toucher;
	start_toucher(&toucher, memory.at + PAGE);
	struct uffd_msg message = read_event(kept);
	say("event", message.event == UFFD_EVENT_PAGEFAULT ? "pagefault" : "other");
	NEED(!copy_pages(kept, memory.at + PAGE, page_filled_with(7), PAGE, NULL));
	say_number("byte", join_toucher(&toucher));
}

static void fault_read_and_forgotten(const char *backing)
{
	int uffd = open_uffd(0, 0);
	struct memory memory = map_memory(backing, 8);
	register_memory(uffd, memory, MISSING);
	struct toucher toucher;
	start_toucher(&toucher, memory.at + PAGE);
	read_event(uffd);
	say_number("again_by_itself", event_waits(uffd, NEGATIVE_WAIT_MS));
	say("wake", name_of(wake(uffd, memory.at, memory.pages * PAGE)));
	struct uffd_msg message = read_event(uffd);
	say_number("again_after_wake_offset", (long long)(message.arg.pagefault.address - (uintptr_t)memory.at));
	NEED(!copy_pages(uffd, memory.at + PAGE, page_filled_with(7), PAGE, NULL));
	say_number("byte", join_toucher(&toucher));
}

static void send_descriptor(int channel, int fd, char *at)
{
	struct iovec body = {&at, sizeof at};
	char control[CMSG_SPACE(sizeof fd)] = {0};
	struct msghdr message = {.msg_iov = &body, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	*header = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
	memcpy(CMSG_DATA(header), &fd, sizeof fd);
	NEED(sendmsg(channel, &message, 0) == sizeof at);
}

static int receive_descriptor(int channel, char **at)
{
	int fd;
	struct iovec body = {at, sizeof *at};
	char control[CMSG_SPACE(sizeof fd)];
	struct msghdr message = {.msg_iov = &body, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	NEED(recvmsg(channel, &message, 0) == sizeof *at);
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
	return fd;
}

/* The child is the VMM: it maps memory that its parent does not have, and hands over an unregistered uffd. */
static void received_descriptor(const char *backing)
{
	int channel[2];
	NEED(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, channel));
	pid_t vmm = fork();
	if (!vmm) {
		struct memory memory = map_memory(backing, 8);
		send_descriptor(channel[1], open_uffd(0, 0), memory.at);
		char ready;
		NEED(read(channel[1], &ready, 1) == 1);
		_exit(touch(memory.at + PAGE));
	}
	close(channel[1]);
	char *at;
	int status, uffd = receive_descriptor(channel[0], &at);
	say("register", name_of(register_range(uffd, at, 8 * PAGE, MISSING)));
	NEED(write(channel[0], "r", 1) == 1);
	struct uffd_msg message = read_event(uffd);
	say_number("offset", (long long)(message.arg.pagefault.address - (uintptr_t)at));
	say("copy", name_of(copy_pages(uffd, at + PAGE, page_filled_with(7), PAGE, NULL)));
	NEED(waitpid(vmm, &status, 0) == vmm && WIFEXITED(status));
	say_number("vmm_read", WEXITSTATUS(status));
}

static void kernel_mode_fault(const char *backing, int flags)
{
	int uffd = open_uffd(flags, 0);
	struct memory memory = map_memory(backing, 8);
	register_memory(uffd, memory, MISSING);
	int ends[2];
	NEED(!pipe(ends));
	say("write", name_of(write(ends[1], memory.at + PAGE, 1) < 0 ? errno : 0));
}

static void user_mode_only(const char *backing) { kernel_mode_fault(backing, UFFD_USER_MODE_ONLY); }

static void *write_to_pipe(void *page)
{
	int ends[2];
	NEED(!pipe(ends));
	return (void *)(intptr_t)(write(ends[1], page, 1) < 0 ? errno : 0);
}

static void kernel_mode_served(const char *backing)
{
	int uffd = open_uffd(0, 0);
	struct memory memory = map_memory(backing, 8);
	register_memory(uffd, memory, MISSING);
	pthread_t writer;
	NEED(!pthread_create(&writer, NULL, write_to_pipe, memory.at + PAGE));
	read_event(uffd);
	NEED(!copy_pages(uffd, memory.at + PAGE, page_filled_with(7), PAGE, NULL));
	void *error;
	NEED(!pthread_join(writer, &error));
	say("write", name_of((intptr_t)error));
}

static struct memory balloon;
static volatile int balloon_done;

static void *inflate(void *unused)
{
	NEED(!madvise(balloon.at, 2 * PAGE, balloon.memfd < 0 ? MADV_DONTNEED : MADV_REMOVE));
	balloon_done = 1;
	return unused;
}

static void remove_event(const char *backing)
{
	int uffd = open_uffd(0, UFFD_FEATURE_EVENT_REMOVE);
	balloon = map_memory(backing, 8);
	register_memory(uffd, balloon, MISSING);
	NEED(!copy_pages(uffd, balloon.at, page_filled_with(7), 2 * PAGE, NULL));
	pthread_t thread;
	NEED(!pthread_create(&thread, NULL, inflate, NULL));
	NEED(event_waits(uffd, -1));
	usleep(NEGATIVE_WAIT_MS * 1000);
	say_number("done_before_read", balloon_done);
	say("copy_meanwhile", name_of(copy_pages(uffd, balloon.at + 4 * PAGE, page_filled_with(9), PAGE, NULL)));
	struct uffd_msg message = read_event(uffd);
	say("event", message.event == UFFD_EVENT_REMOVE ? "remove" : "other");
	say_number("start", (long long)(message.arg.remove.start - (uintptr_t)balloon.at));
	say_number("bytes", (long long)(message.arg.remove.end - message.arg.remove.start));
	NEED(!pthread_join(thread, NULL));
	struct toucher toucher;
	start_toucher(&toucher, balloon.at);
	say("afterwards", read_event(uffd).event == UFFD_EVENT_PAGEFAULT ? "pagefault" : "other");
	NEED(!zero_pages(uffd, balloon.at, PAGE));
	say_number("byte", join_toucher(&toucher));
}

static int unregister(int uffd, char *at, size_t size)
{
	struct uffdio_range range = {.start = (uintptr_t)at, .len = size};
	return ioctl(uffd, UFFDIO_UNREGISTER, &range) ? errno : 0;
}

static void *unmap_two(void *unused)
{
	NEED(!munmap(balloon.at, 2 * PAGE));
	balloon_done = 1;
	return unused;
}

static void unmap_event(const char *backing)
{
	int uffd = open_uffd(0, UFFD_FEATURE_EVENT_UNMAP);
	balloon = map_memory(backing, 8);
	register_memory(uffd, balloon, MISSING);
	pthread_t thread;
	NEED(!pthread_create(&thread, NULL, unmap_two, NULL));
	NEED(event_waits(uffd, -1));
	usleep(NEGATIVE_WAIT_MS * 1000);
	say_number("done_before_read", balloon_done);
	struct uffd_msg message = read_event(uffd);
	say("event", message.event == UFFD_EVENT_UNMAP ? "unmap" : "other");
	say_number("start", (long long)(message.arg.remove.start - (uintptr_t)balloon.at));
	say_number("bytes", (long long)(message.arg.remove.end - message.arg.remove.start));
	NEED(!pthread_join(thread, NULL));
	say("copy_there", name_of(copy_pages(uffd, balloon.at, page_filled_with(9), PAGE, NULL)));
	say("copy_across", name_of(copy_pages(uffd, balloon.at + PAGE, page_filled_with(9), 2 * PAGE, NULL)));
	say("unregister_there", name_of(unregister(uffd, balloon.at, 2 * PAGE)));
	say("unregister_across", name_of(unregister(uffd, balloon.at, 8 * PAGE)));
}

static char *room;

static void *move_two(void *unused)
{
	NEED(mremap(balloon.at, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room) == room);
	balloon_done = 1;
	return unused;
}

static void remap_event(const char *backing)
{
	int uffd = open_uffd(0, UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_UNMAP);
	balloon = map_memory(backing, 8);
	register_memory(uffd, balloon, MISSING);
	room = mmap(NULL, 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	NEED(room != MAP_FAILED);
	pthread_t thread;
	NEED(!pthread_create(&thread, NULL, move_two, NULL));
	struct uffd_msg first = read_event(uffd), second = read_event(uffd);
	say("first", first.event == UFFD_EVENT_REMAP ? "remap" : "other");
	say_number("from", (long long)(first.arg.remap.from - (uintptr_t)balloon.at));
	say_number("bytes", (long long)first.arg.remap.len);
	say("second", second.event == UFFD_EVENT_UNMAP ? "unmap" : "other");
	say_number("start", (long long)(second.arg.remove.start - (uintptr_t)balloon.at));
	NEED(!pthread_join(thread, NULL));
	struct toucher toucher;
	start_toucher(&toucher, room);
	struct uffd_msg fault = read_event(uffd);
	say("touch_there", fault.event == UFFD_EVENT_PAGEFAULT ? "pagefault" : "other");
	NEED(!zero_pages(uffd, room, PAGE));
	join_toucher(&toucher);
}

static void remap_without_event(const char *backing)
{
	int uffd = open_uffd(0, 0);
	balloon = map_memory(backing, 8);
	register_memory(uffd, balloon, MISSING);
	room = mmap(NULL, 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	NEED(room != MAP_FAILED);
	move_two(NULL);
	say_touch("touch_there", room);
}

static void thread_id(const char *backing)
{
	int uffd = open_uffd(0, UFFD_FEATURE_THREAD_ID);
	struct memory memory = map_memory(backing, 8);
	register_memory(uffd, memory, MISSING);
	struct toucher toucher;
	start_toucher(&toucher, memory.at + PAGE);
	struct uffd_msg message = read_event(uffd);
	say_number("same_thread", (int)message.arg.pagefault.feat.ptid == toucher.tid && toucher.tid != getpid());
	NEED(!zero_pages(uffd, memory.at + PAGE, PAGE));
	join_toucher(&toucher);
}

static void continue_many(const char *backing)
{
	int uffd = open_uffd(0, UFFD_FEATURE_MINOR_SHMEM);
	struct memory memory = map_memory(backing, 64);
	char *writable = mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory.memfd, 0);
	NEED(writable != MAP_FAILED);
	register_memory(uffd, memory, UFFDIO_REGISTER_MODE_MINOR);
	memset(writable, 7, 63 * PAGE);
	long long mapped;
	say("cached", name_of(continue_pages(uffd, memory.at, 63 * PAGE, &mapped)));
	say_number("mapped", mapped / (long long)PAGE);
	say("hole", name_of(continue_pages(uffd, memory.at + 63 * PAGE, PAGE, NULL)));
	say_touch("touch", memory.at + 62 * PAGE);
}

static void second_registration(const char *backing)
{
	struct memory memory = map_memory(backing, 2);
	int first = open_uffd(0, 0), second = open_uffd(0, 0);
	say("first", name_of(register_range(first, memory.at, PAGE, UFFDIO_REGISTER_MODE_MISSING)));
	say("same_page", name_of(register_range(second, memory.at, PAGE, UFFDIO_REGISTER_MODE_MISSING)));
	say("other_page", name_of(register_range(second, memory.at + PAGE, PAGE, UFFDIO_REGISTER_MODE_MISSING)));
}

int main(int argc, char **argv)
{
	static const struct fact facts[] = {
		{"last-close", last_close},
		{"second-descriptor", second_descriptor},
		{"fault-read-and-forgotten", fault_read_and_forgotten},
		{"received-descriptor", received_descriptor},
		{"user-mode-only", user_mode_only},
		{"kernel-mode-served", kernel_mode_served},
		{"remove-event", remove_event},
		{"unmap-event", unmap_event},
		{"remap-event", remap_event},
		{"remap-without-event", remap_without_event},
		{"thread-id", thread_id},
		{"continue-many", continue_many},
		{"second-registration", second_registration},
		{NULL, NULL},
	};
	return run_fact(facts, argc, argv);
}
