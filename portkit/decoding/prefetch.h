// What compiled regions read is asked for before it is needed, from every stream at once.
//
// A core's own prefetchers stop at the end of each page, and a stream of a matrix passes one every
// few rows. This header is given to the compiler before the code that torch generates, in which all
// that is read in vectors is read by `loadu`: there it asks for what comes some pages' parts later.
// That rows end is no limit, as the next row follows; and asking beyond the end harms nothing.
#pragma once
#ifndef __ASSEMBLER__  // constants are assembled with the same flags
#include <torch/csrc/inductor/cpp_prefix.h>

namespace portkit {

constexpr int bytes_ahead = 3072;  // measured: 2 KB serves as well, none costs a tenth

template <typename T>
inline const T* reading_on_from(const T* place) {
  __builtin_prefetch(reinterpret_cast<const char*>(place) + bytes_ahead);
  return place;
}

}  // namespace portkit

#define loadu(place, ...) loadu(portkit::reading_on_from(place) __VA_OPT__(, ) __VA_ARGS__)
#endif
