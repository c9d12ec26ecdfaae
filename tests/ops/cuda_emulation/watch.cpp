// What the tests ask of the emulation: which memory a launch may touch, and what it touched.
#include <cuda_runtime.h>

using cuda_emulation::Watch;

extern "C" {

void watch_begin() { cuda_emulation::machine.watch = Watch{.on = true}; }

void watch_allow(const void* begin, uint64_t bytes) {
  const uint64_t at = reinterpret_cast<uint64_t>(begin);
  if (bytes > 0) cuda_emulation::machine.watch.allocations.push_back({at, at + bytes});
}

void watch_end() { cuda_emulation::machine.watch.on = false; }

uint64_t watch_outside() { return cuda_emulation::machine.watch.outside; }
uint64_t watch_sectors() { return cuda_emulation::machine.watch.sectors; }

// Bytes read from, or written to, all allocations that begin in this memory.
uint64_t watch_bytes(const void* begin, uint64_t bytes, bool written) {
  const uint64_t at = reinterpret_cast<uint64_t>(begin);
  uint64_t sum = 0;
  for (const auto& a : cuda_emulation::machine.watch.allocations)
    if (a.begin >= at && a.begin < at + bytes) sum += written ? a.written : a.read;
  return sum;
}

}
