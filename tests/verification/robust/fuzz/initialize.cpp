/// With libFuzzer: DSLINE_WRITE_SEEDS=FOLDER writes the target's seeds and ends.

#include "fuzz/target.hpp"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  if (const char* folder = std::getenv("DSLINE_WRITE_SEEDS")) {
    dsline::robust::write_seeds(folder);
    std::exit(0);
  }
  return 0;
}
