#include "dispatch.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace dq {

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#ifdef DQ_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(&kAvx512);
#endif
#ifdef DQ_AVXVNNI
  if (__builtin_cpu_supports("avxvnni") && __builtin_cpu_supports("fma")) found.push_back(&kAvxVnni);
#endif
#ifdef DQ_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2);
#endif
#elif defined(__aarch64__) && defined(DQ_NEON)
#if defined(__linux__)
  if (getauxval(AT_HWCAP) & 1 << 20) found.push_back(&kNeon);  // HWCAP_ASIMDDP
#else
  found.push_back(&kNeon);  // every Apple processor has it
#endif
#endif
  found.push_back(&kPortable);
  return found;
}

}  // namespace dq
