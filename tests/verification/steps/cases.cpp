#include "cases.hpp"

namespace dsline::steps {
namespace {

constexpr const char* kStartNames[kStarts] = {
    "empty",        "queued",       "full",         "wrapped",      "pinned",
    "given back",   "waited",       "dead holding", "dead writing", "dead committed",
    "dead entered", "dead waiting", "dead viewer",  "dead leaving", "dead joining",
    "grouped",      "grouped full", "historic",     "lettered"};
constexpr const char* kActNames[kActs] = {"send",
                                          "abort",
                                          "receive",
                                          "release",
                                          "give back",
                                          "join",
                                          "leave",
                                          "wait",
                                          "check",
                                          "drop oldest",
                                          "shut down",
                                          "subscribe",
                                          "subscribe oldest",
                                          "enter",
                                          "end group",
                                          "remove group",
                                          "bury",
                                          "take letter",
                                          "release letter",
                                          "return letter",
                                          "revive",
                                          "look"};

}  // namespace

bool is_dead(Start start) noexcept { return start >= Start::DeadHolding && start <= Start::DeadJoining; }

const char* start_name(Start start) noexcept { return kStartNames[static_cast<std::uint32_t>(start)]; }
const char* act_name(Act act) noexcept { return kActNames[static_cast<std::uint32_t>(act)]; }

bool fits(Act act, Start start) noexcept {
  const bool viewer =
      start == Start::DeadViewer || start == Start::DeadLeaving || start == Start::DeadJoining;
  if (start == Start::Lettered) {
    return act == Act::Send || act == Act::Join || act == Act::Leave || act == Act::SubscribeOldest ||
           (act >= Act::Bury && act <= Act::Revive);
  }
  switch (act) {
    case Act::Send:
    case Act::Abort:
      return start != Start::Full && start != Start::GroupedFull;
    case Act::Receive:
      if (start == Start::Historic) return false;
      if (viewer || start == Start::Grouped || start == Start::GroupedFull) return true;
      return start != Start::Empty && start != Start::Waited &&
             (!is_dead(start) || start == Start::DeadEntered);
    case Act::Release:
    case Act::GiveBack:
      if (viewer || start == Start::Historic || start == Start::GroupedFull) return false;
      return start != Start::Empty && start != Start::Waited && start != Start::DeadWaiting;
    case Act::Wait:
      return is_dead(start) && !viewer;
    case Act::Check:
      return is_dead(start);
    case Act::DropOldest:
      if (start == Start::GroupedFull) return true;
      return start == Start::Full || start == Start::Wrapped || start == Start::Pinned ||
             start == Start::GivenBack;
    case Act::Join:
    case Act::Leave:
    case Act::ShutDown:
      return true;
    case Act::Subscribe:
    case Act::SubscribeOldest:
      return start != Start::Wrapped && start != Start::DeadEntered && start != Start::DeadWaiting;
    case Act::Enter:
    case Act::RemoveGroup:
      return start == Start::Grouped || start == Start::GroupedFull;
    case Act::EndGroup:
      return start == Start::Empty || start == Start::Grouped || start == Start::Historic || viewer;
    case Act::Look:
      return start == Start::Historic;
    case Act::Bury:
    case Act::TakeLetter:
    case Act::ReleaseLetter:
    case Act::ReturnLetter:
    case Act::Revive:
      return false;
  }
  return false;
}

bool is_extra(Act act, Start start) noexcept {
  const bool plain = start == Start::Queued || start == Start::GivenBack || start == Start::Pinned ||
                     start == Start::Waited || start == Start::Full;
  if (act == Act::Join) return plain;
  if (act == Act::Subscribe || act == Act::SubscribeOldest) {
    return (plain && start != Start::Queued) || start == Start::DeadWriting || start == Start::DeadHolding;
  }
  return act == Act::Wait && start == Start::DeadEntered;
}

}  // namespace dsline::steps
