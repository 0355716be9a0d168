#pragma once

namespace dsline::steps {

/// From here on this process kills itself when it comes to the label.
void die_at(const char* label) noexcept;

}  // namespace dsline::steps
