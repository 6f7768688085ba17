// Chooses the kernel table of one instruction set, once per process.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "cpu/kernels.h"

namespace metalens::cpu {

// Each table is defined in isa/<name>.cpp.
#define METALENS_DECLARE_TABLE(isa) \
  namespace isa {                   \
  extern const KernelTable table;   \
  }

#if defined(__aarch64__)
METALENS_DECLARE_TABLE(neon)
METALENS_DECLARE_TABLE(neonbf16)
constexpr const KernelTable& baseline = neon::table;
#else
METALENS_DECLARE_TABLE(portable)
constexpr const KernelTable& baseline = portable::table;
#endif
#if defined(__x86_64__)
METALENS_DECLARE_TABLE(avx2)
METALENS_DECLARE_TABLE(avx512)
METALENS_DECLARE_TABLE(avx512bf16)
METALENS_DECLARE_TABLE(amx)
#endif

namespace {

#if defined(__aarch64__)

bool has_bf16_dot() {
#if defined(__APPLE__)
  int present = 0;
  size_t size = sizeof(present);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &present, &size, nullptr, 0) == 0 && present;
#elif defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16 of <asm/hwcap.h>, which older systems lack
  return getauxval(AT_HWCAP2) & kBf16;
#else
  return false;
#endif
}

#endif

#if defined(__x86_64__)

// Not every compiler's __builtin_cpu_supports knows f16c.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kF16c = 1u << 29;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & kF16c);
}

// Whether the CPU has AMX with bfloat16 and the system lets this process use it. Linux permits it on request, also for threads started later.
bool amx_permitted() {
#if defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kOsxsave = 1u << 27, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kOsxsave)) return false;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (kAmxBf16 | kAmxTile)) != (kAmxBf16 | kAmxTile)) return false;
  // The system saves the tiles' configuration (bit 17) and data (bit 18) when it switches tasks.
  constexpr unsigned kTileStates = 3u << 17;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileStates) != kTileStates) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of <asm/prctl.h>, which older systems lack
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif

std::vector<const KernelTable*> available() {
  std::vector<const KernelTable*> tables{&baseline};
#if defined(__aarch64__)
  if (has_bf16_dot()) tables.push_back(&neonbf16::table);
#endif
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    tables.push_back(&avx2::table);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      tables.push_back(&avx512::table);
      if (__builtin_cpu_supports("avx512bf16")) {
        tables.push_back(&avx512bf16::table);
        static const bool amx = amx_permitted();
        if (amx) tables.push_back(&amx::table);
      }
    }
  }
#endif
  return tables;
}

std::string names(const std::vector<const KernelTable*>& tables) {
  std::string all;
  for (const auto* table : tables) {
    if (!all.empty()) all += ' ';
    all += table->name;
  }
  return all;
}

const KernelTable& choose() {
  const auto tables = available();
  const char* wanted = std::getenv("METALENS_ISA");
  if (!wanted || !*wanted) return *tables.back();
  for (const auto* table : tables) {
    if (std::string(table->name) == wanted) return *table;
  }
  throw std::runtime_error("METALENS_ISA=" + std::string(wanted) + " is not available here. Choose one of: " + names(tables) + ", or unset it.");
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

const char* available_isas() {
  static const std::string all = names(available());
  return all.c_str();
}

}  // namespace metalens::cpu
