/* One call of `forward`, as a program: its arguments lie in a file, whose addresses hold where it is
 * mapped to (test_arm.py writes it), and so does what it leaves behind. */

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include "../../../engine/kernels/decoder.c"

typedef struct {
    const model *m;
    const cache *c;
    const batch *b;
    float *logits;
    int64_t place, size, room, blocks, threads;
} call;

int main(int count, char **words) {
    call what;
    int file = open(words[count - 1], O_RDWR);
    if (file < 0 || read(file, &what, sizeof what) != sizeof what) return 2;
    void *place = (void *)what.place;
    if (mmap(place, what.size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) != place)
        return 3;
    size_t bytes = up(workspace_bytes(what.m, what.room, what.blocks, what.threads), 64) * 64;
    char *work = aligned_alloc(64, bytes);
    memset(work, 0, bytes);
    forward(what.m, what.c, what.b, work, what.room, what.blocks, what.logits, what.threads);
    return 0;
}
