/* The first process of a Linux guest. A child of it fills memory with 'A' and reads it again and again. When it has ended
 * by SIGBUS, says again and again the signal's code and lsb, and how much memory the guest's kernel took out of service:
 * a line of the kernel's may come in between one of these. */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define BYTES (8UL << 20)

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	_exit(info->si_code << 4 | info->si_addr_lsb);
}

static void read_for_ever(void)
{
	struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};
	sigaction(SIGBUS, &action, NULL);
	char *memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(memory, BYTES, MADV_NOHUGEPAGE);
	memset(memory, 'A', BYTES);
	for (int pass = 0;; pass++) {
		for (size_t at = 0; at < BYTES; at += 4096)
			(void)*(volatile char *)(memory + at);
		printf("guest: pass %d\n", pass);
		sleep(1);
	}
}

int main(void)
{
	setvbuf(stdout, NULL, _IONBF, 0);
	pid_t child = fork();
	if (!child)
		read_for_ever();
	int status, kib = -1;
	waitpid(child, &status, 0);
	mkdir("/proc", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	char line[256];
	FILE *file = fopen("/proc/meminfo", "r");
	while (file && fgets(line, sizeof line, file))
		sscanf(line, "HardwareCorrupted: %d kB", &kib);
	for (int second = 0;; second++) {
		printf("guest: lives %d, code %d lsb %d, bad %d KiB.\n", second, WEXITSTATUS(status) >> 4,
		       WEXITSTATUS(status) & 15, kib);
		sleep(1);
	}
}
