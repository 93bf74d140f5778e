/* Preloaded into a Python process: how many bytes of its heap are live, and how many were at most.
   Counts what malloc and its kin give, by their usable size, whoever asks for it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static _Atomic long live, peak;

static void *given(void *block) {
  if (block) {
    long size = (long)malloc_usable_size(block);
    long now = atomic_fetch_add(&live, size) + size;
    long most = atomic_load(&peak);
    while (now > most && !atomic_compare_exchange_weak(&peak, &most, now)) {
    }
  }
  return block;
}

static void taken(void *block) {
  if (block) atomic_fetch_sub(&live, (long)malloc_usable_size(block));
}

void *malloc(size_t size) { return given(__libc_malloc(size)); }
void *calloc(size_t count, size_t size) { return given(__libc_calloc(count, size)); }
void *memalign(size_t align, size_t size) { return given(__libc_memalign(align, size)); }
void *aligned_alloc(size_t align, size_t size) { return given(__libc_memalign(align, size)); }

int posix_memalign(void **block, size_t align, size_t size) {
  *block = given(__libc_memalign(align, size));
  return *block ? 0 : ENOMEM;
}

void *realloc(void *block, size_t size) {
  long before = block ? (long)malloc_usable_size(block) : 0;
  void *moved = __libc_realloc(block, size);
  if (moved || size == 0) atomic_fetch_sub(&live, before);
  return given(moved);
}

void free(void *block) {
  taken(block);
  __libc_free(block);
}

long heap_live(void) { return atomic_load(&live); }
long heap_peak(void) { return atomic_load(&peak); }
void heap_reset(void) { atomic_store(&peak, atomic_load(&live)); }
