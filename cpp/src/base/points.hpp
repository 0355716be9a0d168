#pragma once

/// Places where the proof kills a process (tests/verification). Nothing in a product build.
#if defined(DSLINE_KILL_POINTS)
namespace dsline::base {
void reached(const char* label) noexcept;  // supplied by the test program
}
#define DSLINE_POINT(label) ::dsline::base::reached(label)
#else
#define DSLINE_POINT(label) static_cast<void>(0)
#endif
