// Measures the peaks of this machine on all usable cores at once: multiply-adds on registers alone, and reading memory once.
//
// peaks.py builds this file as a shared library with -O2 -march=native. Each call is a burst of about the requested length, short enough to run
// just before and just after a measurement: on a shared machine the peak itself changes by a factor of two within minutes.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
constexpr int kLanes = kVectorBytes / 4;

// Enough independent sums to hide the latency of a multiply-add (4 cycles, two per cycle, on every known CPU), and few enough to stay in
// 16 registers together with two factors.
constexpr int kSums = 12;
constexpr int kStepsBetweenClocks = 4096;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Keeps the compiler from removing a value or its loop, at no cost.
template <typename T>
void keep(T& value) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(value));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(value));
#else
  asm volatile("" : "+m"(value));
#endif
}

template <size_t... I>
double fma_flop(std::index_sequence<I...>) {
  Vector sums[kSums] = {}, factor = Vector{} + 0.5f, term = Vector{} + 1e-9f;
  keep(factor);
  keep(term);
  for (int step = 0; step < kStepsBetweenClocks; ++step) {
    ((sums[I] = sums[I] * factor + term), ...);
    (keep(sums[I]), ...);
  }
  return 2.0 * kLanes * kSums * kStepsBetweenClocks;
}

double fma_flop() {
  return fma_flop(std::make_index_sequence<kSums>());
}

#if defined(__AVX512BF16__)
template <size_t... I>
double bf16_dot_flop(std::index_sequence<I...>) {
  __m512 sums[kSums] = {};
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = (__m512bh)_mm512_set1_epi16(0x2f80);
  for (int step = 0; step < kStepsBetweenClocks; ++step) {
    ((sums[I] = _mm512_dpbf16_ps(sums[I], a, b)), ...);
    (keep(sums[I]), ...);
  }
  return 2.0 * 32 * kSums * kStepsBetweenClocks;
}

double bf16_dot_flop() {
  return bf16_dot_flop(std::make_index_sequence<kSums>());
}
#endif

#if defined(__AMX_BF16__)
struct TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// Linux grants tile state on request only; threads that are created afterward inherit the permission.
bool amx_permitted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

void amx_begin() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.bytes_per_row[i] = 64;
    config.rows[i] = 16;
  }
  asm volatile("" ::: "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
}

double amx_flop() {
  for (int step = 0; step < kStepsBetweenClocks; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return 4.0 * 2 * 16 * 16 * 32 * kStepsBetweenClocks;
}
#endif

std::vector<Words> buffer;  // read by read_peak, which allocates it at its first call; larger than any cache

template <size_t... I>
double read_bytes(const Words* from, size_t count, std::index_sequence<I...>) {
  Words sums[8] = {};
  for (size_t i = 0; i + 8 <= count; i += 8) {
    ((sums[I] ^= from[i + I]), ...);
  }
  (keep(sums[I]), ...);
  return double(count) * kVectorBytes;
}

// Runs `work` on every thread until `seconds` have passed, with a common start, and returns the sum of the threads' rates.
template <typename Begin, typename Work, typename End>
double all_cores(int threads, double seconds, Begin begin, Work work, End end) {
  std::atomic<int> waiting{threads};
  std::vector<double> rates(threads);
  auto body = [&](int thread) {
    begin();
    --waiting;
    while (waiting.load() > 0) std::this_thread::yield();
    const auto start = Clock::now();
    double done = 0, elapsed = 0;
    while (elapsed < seconds) {
      done += work(thread);
      elapsed = seconds_since(start);
    }
    rates[thread] = done / elapsed;
    end();
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(body, thread);
  body(0);
  for (auto& other : others) other.join();
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

void nothing() {
}

}  // namespace

extern "C" {

// Returns the bits of a vector register in the float32 burst.
int vector_bits() {
  return 8 * kVectorBytes;
}

// Returns the FLOP/s of float32 multiply-adds on registers.
double fma_peak(int threads, double seconds) {
  return all_cores(threads, seconds, nothing, [](int) { return fma_flop(); }, nothing);
}

// Returns the FLOP/s of bfloat16 dot products on registers (AVX-512 BF16); 0 if the CPU has none.
double bf16_dot_peak(int threads, double seconds) {
#if defined(__AVX512BF16__)
  return all_cores(threads, seconds, nothing, [](int) { return bf16_dot_flop(); }, nothing);
#else
  return (void)threads, (void)seconds, 0.0;
#endif
}

// Returns the FLOP/s of bfloat16 products on tile registers (AMX); 0 if the CPU or the operating system has none.
double amx_peak(int threads, double seconds) {
#if defined(__AMX_BF16__)
  if (!amx_permitted()) return 0.0;
  return all_cores(threads, seconds, amx_begin, [](int) { return amx_flop(); }, [] { _tile_release(); });
#else
  return (void)threads, (void)seconds, 0.0;
#endif
}

// Returns the bytes/s of reading memory that no cache holds. Each thread reads its own part repeatedly, in pieces of 1 MiB.
double read_peak(int threads, double seconds) {
  constexpr size_t kBytes = size_t{384} << 20, kPiece = (size_t{1} << 20) / kVectorBytes;
  if (buffer.empty()) buffer.assign(kBytes / kVectorBytes, Words{} + 1);
  const size_t part = buffer.size() / threads / kPiece * kPiece;
  std::vector<size_t> positions(threads);
  return all_cores(
      threads, seconds, nothing,
      [&](int thread) {
        const size_t at = positions[thread];
        positions[thread] = (at + kPiece) % part;
        return read_bytes(buffer.data() + thread * part + at, kPiece, std::make_index_sequence<8>());
      },
      nothing);
}
}
