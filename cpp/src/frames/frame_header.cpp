#include "frames/frame_header.hpp"

namespace dsline::frames {

const char* describe(FrameFault fault) noexcept {
  switch (fault) {
    case FrameFault::None:
      return "no fault";
    case FrameFault::Magic:
      return "the frame's magic number is wrong";
    case FrameFault::Version:
      return "the frame's version is not known here";
    case FrameFault::Kind:
      return "the frame's kind is not known here";
    case FrameFault::Flags:
      return "the frame's flags are not known here";
    case FrameFault::Lengths:
      return "the frame's lengths do not fit into its slot";
    case FrameFault::HeaderChecksum:
      return "the frame's header checksum does not match";
    case FrameFault::PayloadChecksum:
      return "the frame's payload checksum does not match";
    case FrameFault::Metadata:
      return "the frame's metadata is malformed";
  }
  return "the frame has an unknown fault";
}

}  // namespace dsline::frames
