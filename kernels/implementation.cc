#include "kernels/implementation.h"

#include <cstdio>
#include <cstdlib>
#include <string>

#include "kernels/avx2.h"
#include "kernels/avx512.h"
#include "kernels/scalar.h"

namespace kvant::kernels {
namespace {

#if defined(__x86_64__)
const Implementation* const kImplementations[] = {&kAvx512, &kAvx2, &kScalar};
#else
const Implementation* const kImplementations[] = {&kScalar};
#endif

const Result<const Implementation*>& Chosen() {
  static const Result<const Implementation*> chosen = [] {
    const char* name = std::getenv("KVANT_ISA");
    return FindImplementation(name == nullptr ? "" : name);
  }();
  return chosen;
}

}  // namespace

std::span<const Implementation* const> Implementations() { return kImplementations; }

Result<const Implementation*> FindImplementation(std::string_view name) {
  std::string known;
  for (const Implementation* implementation : kImplementations) {
    if (name.empty() && implementation->runs_here()) return implementation;
    if (name == implementation->name) {
      if (implementation->runs_here()) return implementation;
      return MakeStatus(StatusCode::kUnsupported,
                        "choosing kernels: KVANT_ISA={} asks for instructions that this CPU does "
                        "not have; unset it to let the CPU decide",
                        name);
    }
    known += known.empty() ? "" : ", ";
    known += implementation->name;
  }
  return InvalidArgument("choosing kernels: KVANT_ISA={} is unknown; there are: {}", name, known);
}

Status ChooseImplementation() { return Chosen().status(); }

const Implementation& ActiveImplementation() {
  const Result<const Implementation*>& chosen = Chosen();
  if (!chosen.ok()) {
    std::fprintf(stderr, "%s\n", chosen.status().ToString().c_str());
    std::exit(2);
  }
  return **chosen;
}

}  // namespace kvant::kernels
