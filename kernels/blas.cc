// OpenBLAS, looked up at run time: its core type must be chosen before it is loaded, and a node
// without it should get a sentence, not a loader error.
#include "kernels/blas.h"

#include <dlfcn.h>

#include <cstdlib>

#include "base/check.h"

namespace kvant::kernels {
namespace {

constexpr const char* kLibrary = "libopenblas.so.0";

// Fortran's calling convention; matrices are column-major, so that a symmetric one is the same.
struct Blas {
  Status status;
  SgemmFunction* sgemm = nullptr;
  LapackFunctions lapack;
  char* (*core_name)() = nullptr;
};

bool CpuHasSkylakeX() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

template <typename Function>
bool Lookup(void* library, const char* name, Function** function) {
  *function = reinterpret_cast<Function*>(dlsym(library, name));
  return *function != nullptr;
}

Blas Load() {
  Blas blas;
  // OpenBLAS 0.3.21 knows neither Zen 4 nor Zen 5 and falls back to Haswell kernels there, whose
  // bits depend on the row count and which leave half of the vector width unused.
  if (CpuHasSkylakeX()) setenv("OPENBLAS_CORETYPE", "SkylakeX", /*overwrite=*/0);
  // Threads belong to main(): without this the library starts its own when it is loaded.
  setenv("OPENBLAS_NUM_THREADS", "1", /*overwrite=*/1);
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    blas.status = MakeStatus(StatusCode::kUnsupported,
                             "loading OpenBLAS for dense layers: {}; install it with: apt-get "
                             "install libopenblas0-pthread",
                             dlerror());
    return blas;
  }
  void (*set_num_threads)(int) = nullptr;
  if (!Lookup(library, "cblas_sgemm", &blas.sgemm) ||
      !Lookup(library, "openblas_get_corename", &blas.core_name) ||
      !Lookup(library, "openblas_set_num_threads", &set_num_threads)) {
    blas.status = MakeStatus(StatusCode::kUnsupported,
                             "loading OpenBLAS for dense layers: {} lacks a function ({}); "
                             "reinstall it with: apt-get install --reinstall libopenblas0-pthread",
                             kLibrary, dlerror());
    return blas;
  }
  LapackFunctions lapack;
  if (Lookup(library, "ssyevd_", &lapack.ssyevd) && Lookup(library, "dsyevd_", &lapack.dsyevd) &&
      Lookup(library, "dposv_", &lapack.dposv)) {
    blas.lapack = lapack;
  }
  set_num_threads(1);
  return blas;
}

// The library stays loaded until the process ends.
const Blas& Loaded() {
  static const Blas blas = Load();
  return blas;
}

}  // namespace

Status LoadBlas() { return Loaded().status; }

std::string BlasCoreType() {
  KV_CHECK(Loaded().status.ok());
  return Loaded().core_name();
}

SgemmFunction* LoadedSgemm() {
  KV_CHECK(Loaded().status.ok());
  return Loaded().sgemm;
}

LapackFunctions LoadedLapack() {
  KV_CHECK(Loaded().status.ok());
  return Loaded().lapack;
}

}  // namespace kvant::kernels
