/* A second mapping of a memfd, in another process than the VMM's: what the pagers send from, and receive into. */
#include "facts.h"
#include <sys/stat.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

static char *map_again(struct memory memory, int protection)
{
	char *at = mmap(NULL, memory.pages * PAGE, protection, MAP_SHARED, memory.memfd, 0);
	NEED(at != MAP_FAILED);
	return at;
}

static long long pages_held(struct memory memory)
{
	struct stat file;
	NEED(!fstat(memory.memfd, &file));
	return file.st_blocks * 512LL / (long long)PAGE;
}

static void write_page(struct memory memory, size_t page, char byte)
{
	char bytes[PAGE];
	memset(bytes, byte, PAGE);
	NEED(pwrite(memory.memfd, bytes, PAGE, page * PAGE) == (ssize_t)PAGE);
}

static void residence(const char *backing)
{
	struct memory memory = map_memory(backing, 2);
	write_page(memory, 1, 7);
	char *again = map_again(memory, PROT_READ);
	unsigned char resident[2];
	NEED(!mincore(again, 2 * PAGE, resident));
	say_number("hole", resident[0] & 1);
	say_number("data", resident[1] & 1);
	say_number("held", pages_held(memory));
	say("populate_data", name_of(madvise(again + PAGE, PAGE, MADV_POPULATE_READ) ? errno : 0));
	say_number("held_then", pages_held(memory));
}

static void touched_hole(const char *backing)
{
	struct memory memory = map_memory(backing, 1);
	char *again = map_again(memory, PROT_READ);
	say_number("held", pages_held(memory));
	say_touch("touch", again);
	say_number("held_then", pages_held(memory));
}

static void sent_page_goes(const char *backing)
{
	struct memory memory = map_memory(backing, 2);
	memset(memory.at, 7, 2 * PAGE);
	char *again = map_again(memory, PROT_READ);
	NEED(!madvise(again, 2 * PAGE, MADV_POPULATE_READ));
	NEED(!ftruncate(memory.memfd, PAGE));
	int ends[2];
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	say_number("sent", write(ends[0], again + PAGE - 8, 8));
	say("gone", name_of(write(ends[0], again + PAGE, 8) < 0 ? errno : 0));
	say_touch("touch", again + PAGE);
}

static void received_in_place(const char *backing)
{
	int uffd = open_uffd(0, UFFD_FEATURE_MINOR_SHMEM);
	struct memory memory = map_memory(backing, 2);
	register_memory(uffd, memory, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	char *again = map_again(memory, PROT_READ | PROT_WRITE);
	say("populate", name_of(madvise(again, 2 * PAGE, MADV_POPULATE_WRITE) ? errno : 0));
	char bytes[PAGE];
	memset(bytes, 7, PAGE);
	int ends[2];
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	NEED(write(ends[0], bytes, PAGE) == (ssize_t)PAGE);
	say_number("received", recv(ends[1], again + PAGE, PAGE, MSG_WAITALL));
	struct uffd_msg event;
	say("event", read(uffd, &event, sizeof event) < 0 ? name_of(errno) : "some");
	say("continue", name_of(continue_pages(uffd, memory.at + PAGE, PAGE, NULL)));
	say_touch("touch", memory.at + PAGE);
}

/* Of two blocks of 2 MiB, of which a page is there, the first is to be one huge page. */
static int collapse_first(char *again)
{
	NEED(!madvise(again, PAGE, MADV_POPULATE_WRITE));
	return madvise(again, HUGE_PAGE, MADV_COLLAPSE) ? errno : 0;
}

static void huge_page_ahead(const char *backing)
{
	int uffd = open_uffd(0, UFFD_FEATURE_MINOR_SHMEM);
	struct memory memory = map_memory(backing, 2 * HUGE_PAGE / PAGE);
	register_memory(uffd, memory, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	char *room = mmap(NULL, memory.pages * PAGE + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	NEED(room != MAP_FAILED);
	room += (HUGE_PAGE - (uintptr_t)room % HUGE_PAGE) % HUGE_PAGE;
	char *again = mmap(room, memory.pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory.memfd, 0);
	NEED(again != MAP_FAILED);
	say("registered", name_of(collapse_first(again)));
	unregister_memory(uffd, memory);
	int error = collapse_first(again);
	if (error == ENOMEM || error == EINVAL)
		LACKING("MADV_COLLAPSE: %s: no block of 2 MiB is free, or Linux before 6.1", name_of(error));
	say("unregistered", name_of(error));
	say_number("held", pages_held(memory));
	register_memory(uffd, memory, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	say("continue", name_of(continue_pages(uffd, memory.at + PAGE, PAGE, NULL)));
	say_touch("touch", memory.at + PAGE);
}

int main(int argc, char **argv)
{
	static const struct fact facts[] = {
		{"residence", residence},
		{"touched-hole", touched_hole},
		{"sent-page-goes", sent_page_goes},
		{"received-in-place", received_in_place},
		{"huge-page-ahead", huge_page_ahead},
		{NULL, NULL},
	};
	return run_fact(facts, argc, argv);
}
