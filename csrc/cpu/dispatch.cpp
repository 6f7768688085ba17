// Chooses the kernels of one instruction set, once per process.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace metalens::cpu {

#if defined(__aarch64__)
extern const KernelTable neon_kernels;
constexpr const KernelTable& baseline = neon_kernels;
#else
extern const KernelTable portable_kernels;
constexpr const KernelTable& baseline = portable_kernels;
#endif
#if defined(__x86_64__)
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
#endif

namespace {

std::vector<const KernelTable*> available() {
  std::vector<const KernelTable*> tables{&baseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    tables.push_back(&avx2_kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      tables.push_back(&avx512_kernels);
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
