// What this build of the library can do, in words.
#include "multiply.h"

// A space-separated list; the Python side only shows it.
OCTAVO_EXPORT const char* octavo_features() {
  return ""
#if defined(__AVX512F__)
         "avx512 "
#elif defined(__AVX2__)
         "avx2 "
#else
         "baseline "
#endif
#if defined(__AVX512BF16__)
         "avx512_bf16 "
#endif
      ;
}

// 1 when AMX was compiled in and the kernel grants its registers.
OCTAVO_EXPORT int octavo_amx() {
#if defined(OCTAVO_AMX)
  return octavo::amx_granted();
#else
  return 0;
#endif
}
