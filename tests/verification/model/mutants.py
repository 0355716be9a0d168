"""Seeded mistakes in the core, each of which the model must catch.

A mutant is a change of one place in the core's sources, compiled in beside the original and switched on at run time by
its number: MUTANT(n). Its search text must occur exactly once, so that a mutant whose place has changed fails the run.
"""

from __future__ import annotations

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Mutant:
    number: int
    name: str
    file: str  # below cpp/src
    search: str
    replace: str
    setups: tuple[str, ...]  # it must be caught in one of these
    more: tuple[tuple[str, str, str], ...] = ()  # further places: file, search, replace


MUTANTS = [
    Mutant(
        1,
        "alloc leaves the old position",
        "slots/slot_pool.hpp",
        "region_->slot(s).position.store(kNoPosition, std::memory_order_relaxed);\n    return true;",
        "if (!MUTANT(1)) region_->slot(s).position.store(kNoPosition, std::memory_order_relaxed);\n    return true;",
        ("lap",),
    ),
    Mutant(
        2,
        "commit leaves the old claims",
        "slots/slot_pool.hpp",
        "    for (std::uint32_t left = groups; left != 0; left &= left - 1) {\n",
        "    for (std::uint32_t left = MUTANT(2) ? 0 : groups; left != 0; left &= left - 1) {\n",
        ("lap",),
    ),
    Mutant(
        3,
        "publish leaves the claims at no position",
        "order/order_ring.hpp",
        "for (std::uint32_t left = groups; left != 0; left &= left - 1) {",
        "for (std::uint32_t left = MUTANT(3) ? 0 : groups; left != 0; left &= left - 1) {",
        ("one-to-one",),
    ),
    Mutant(
        4,
        "the tail moves only from t to t + 1",
        "order/order_ring.hpp",
        "    region_->order().tail.compare_exchange_strong(entered.hint,",
        "    if (MUTANT(4)) entered.hint = entered.position;\n"
        "    region_->order().tail.compare_exchange_strong(entered.hint,",
        ("two-to-one-kill",),
    ),
    Mutant(
        5,
        "take: the claim is stored, not compared and swapped",
        "order/group.hpp",
        "    // SYNC claim: pairs with enter() (position and frame) and with recovery's hand-over.\n",
        "    if (MUTANT(5) && region_->claim(s, number_).load() == unclaimed.bits) {\n"
        "      region_->claim(s, number_).store(unclaimed.with(0, who).bits);\n"
        "      return true;\n"
        "    }\n"
        "    // SYNC claim: pairs with enter() (position and frame) and with recovery's hand-over.\n",
        ("two-consumers-kill",),
    ),
    Mutant(
        6,
        "take: the claim is stored without a look at it",
        "order/group.hpp",
        "    // SYNC claim: pairs with enter() (position and frame) and with recovery's hand-over.\n",
        "    if (MUTANT(6)) {\n"
        "      region_->claim(s, number_).store(unclaimed.with(0, who).bits);\n"
        "      return true;\n"
        "    }\n"
        "    // SYNC claim: pairs with enter() (position and frame) and with recovery's hand-over.\n",
        ("two-consumers",),
    ),
    Mutant(
        7,
        "the redeliver flag is lowered after the scan, whatever it has become",
        "order/group.hpp",
        "      if (oldest == region_->geometry().slots) {\n",
        "      if (oldest == region_->geometry().slots) {\n        if (MUTANT(7)) loaded = flag.load();\n",
        ("nack", "nack-kill"),
    ),
    Mutant(
        8,
        "recovery without the dead one's lock",
        "liveness/participants.cpp",
        "  if (!region_->storage().try_lock(memory::participant_lock(number))) return false;\n",
        "  if (!region_->storage().try_lock(memory::participant_lock(number)) && !MUTANT(8)) return false;\n",
        ("two-recoverers",),
    ),
    Mutant(
        9,
        "V4: a message that was lapped counts as not in the order",
        "liveness/recovery.cpp",
        "  if (groups == 0) return true;\n",
        "  if (MUTANT(9)) return false;\n  if (groups == 0) return true;\n",
        ("lap-held",),
    ),
    Mutant(
        10,
        "V2: a message without a position counts as in the order",
        "liveness/recovery.cpp",
        "  if (q == slots::kNoPosition) return false;\n",
        "  if (q == slots::kNoPosition) return MUTANT(10);\n",
        ("one-to-one",),
    ),
    Mutant(
        11,
        "V3: an older cell counts as the message's",
        "liveness/recovery.cpp",
        "  if (ahead < 0) return false;\n",
        "  if (ahead < 0) return MUTANT(11);\n",
        ("one-to-one",),
    ),
    Mutant(
        12,
        "V5: a message in the order keeps its ENQ",
        "liveness/recovery.cpp",
        '    DSLINE_POINT("recover.before_not_enqueueing");\n    pool.clear_pending(s, slots::kEnqueueing);\n',
        '    DSLINE_POINT("recover.before_not_enqueueing");\n'
        "    if (!MUTANT(12)) pool.clear_pending(s, slots::kEnqueueing);\n",
        ("one-to-one",),
    ),
    Mutant(
        13,
        "V1: a half written slot stays",
        "liveness/recovery.cpp",
        "    pool.abort(s, word);\n    return;\n",
        "    if (!MUTANT(13)) pool.abort(s, word);\n    return;\n",
        ("one-to-one",),
    ),
    Mutant(
        14,
        "V7: what the dead one held goes back as untouched",
        "liveness/recovery.cpp",
        "compare_exchange_strong(seen.bits, claim.given_back().bits, std::memory_order_acq_rel);",
        "compare_exchange_strong(seen.bits, MUTANT(14) ? claim.with(claim.attempts(), Claim::kNobody).bits\n"
        "        : claim.given_back().bits, std::memory_order_acq_rel);",
        ("two-consumers-kill",),
    ),
    Mutant(
        15,
        "V7 and V8: the flag is not raised",
        "order/group.hpp",
        "  void raise() noexcept {\n",
        "  void raise() noexcept {\n    if (MUTANT(15)) return;\n",
        ("nack", "two-consumers-kill"),
    ),
    Mutant(
        16,
        "a release clears all bits",
        "slots/slot_pool.hpp",
        "    SlotWord before{region_->slot(s).word.fetch_and(~std::uint64_t{bits}, std::memory_order_acq_rel)};\n",
        "    if (MUTANT(16)) bits = kPendingMask;\n"
        "    SlotWord before{region_->slot(s).word.fetch_and(~std::uint64_t{bits}, std::memory_order_acq_rel)};\n",
        ("one-to-one",),
    ),
    Mutant(
        17,
        "commit without the publisher's own bit",
        "slots/slot_pool.hpp",
        "0 : groups | kEnqueueing;\n",
        "0 : groups | kEnqueueing;\n    if (MUTANT(17)) pending = groups;\n",
        ("one-to-one",),
    ),
    Mutant(
        18,
        "the dead one's entry is freed before its slots are recovered",
        "liveness/recovery.cpp",
        "    recover(region, d);\n",
        "    if (MUTANT(18)) participants.bury(d);\n    recover(region, d);\n",
        ("two-recoverers",),
    ),
    Mutant(
        19,
        "a delivery that ended in death is not counted",
        "slots/claim.hpp",
        "attempts() < kMaxAttempts ? attempts() + 1 : kMaxAttempts;",
        "MUTANT(19) ? attempts() : attempts() < kMaxAttempts ? attempts() + 1 : kMaxAttempts;",
        ("nack",),
    ),
    Mutant(
        20,
        "T0: a message that was given back is taken by a store",
        "order/group.hpp",
        "      slots::Claim wanted = oldest_claim;\n",
        "      if (MUTANT(20)) {\n"
        "        region_->claim(oldest, number_).store(\n"
        "            oldest_claim.with(oldest_claim.attempts(), who).bits);\n"
        "        held = Held{oldest, oldest_position, oldest_claim.attempts()};\n"
        "        return true;\n"
        "      }\n"
        "      slots::Claim wanted = oldest_claim;\n",
        ("nack",),
    ),
    Mutant(
        21,
        "T1: an empty cell is stepped over",
        "order/group.hpp",
        "    if (ahead < 0) return {Look::Empty, 0, p};\n",
        "    if (ahead < 0 && MUTANT(21)) return {Look::Nothing, 0, p + 1};\n"
        "    if (ahead < 0) return {Look::Empty, 0, p};\n",
        ("one-to-one",),
    ),
    Mutant(
        22,
        "a publisher wakes nobody",
        "waiting/wait_point.hpp",
        "    if (anyone()) [[unlikely]]\n",
        "    if (anyone() && !MUTANT(22)) [[unlikely]]\n",
        ("sleep-message",),
    ),
    Mutant(
        23,
        "a waker does not count",
        "waiting/wait_point.hpp",
        "    state_->sequence.fetch_add(1, std::memory_order_seq_cst);\n",
        "    if (!MUTANT(23)) state_->sequence.fetch_add(1, std::memory_order_seq_cst);\n",
        ("sleep-one",),
    ),
    Mutant(
        24,
        "a sleeper does not say that it sleeps",
        "waiting/wait_point.hpp",
        "    state_->waiters[participant / 64].fetch_or(bit(participant), std::memory_order_seq_cst);\n",
        "    if (!MUTANT(24)) state_->waiters[participant / 64].fetch_or(bit(participant), std::memory_order_seq_cst);\n",
        ("sleep-message",),
    ),
    Mutant(
        25,
        "a freed slot wakes no producer",
        "slots/slot_pool.hpp",
        "    base::fence_seq_cst_after_rmw();\n    space_.wake_one_if_anyone();\n",
        "    base::fence_seq_cst_after_rmw();\n    if (!MUTANT(25)) space_.wake_one_if_anyone();\n",
        ("sleep-space",),
    ),
    Mutant(
        26,
        "a message that was given back wakes nobody",
        "order/group.hpp",
        "    base::fence_seq_cst_after_rmw();\n    messages_.wake_one_if_anyone();\n",
        "    base::fence_seq_cst_after_rmw();\n    if (!MUTANT(26)) messages_.wake_one_if_anyone();\n",
        ("sleep-nack",),
    ),
    Mutant(
        27,
        "positions run through the one that means none",
        "slots/position.hpp",
        "  return (position & kPositionMask) == kNoPositionLow ? position + 1 : position;\n",
        "  return (position & kPositionMask) == kNoPositionLow && !MUTANT(27) ? position + 1 : position;\n",
        ("wrap-64",),
    ),
    Mutant(
        28,
        "join: active before the cursor",
        "liveness/membership.cpp",
        "    const std::uint64_t tail = ring.tail_guess();\n    group.cursor",
        "    if (MUTANT(28)) region_->header().active.fetch_or(std::uint64_t{1} << g);\n"
        "    const std::uint64_t tail = ring.tail_guess();\n    group.cursor",
        ("late-group",),
    ),
    Mutant(
        29,
        "join: a number is given away while a word has its bit",
        "liveness/membership.cpp",
        "    if (is_in_use(g)) {",
        "    if (!MUTANT(29) && is_in_use(g)) {",
        ("group-returns-holding",),
    ),
    Mutant(
        30,
        "sweep: a message that is still entering is released",
        "liveness/membership.cpp",
        "word.is_entering() || (word.pending() >> g & 1) == 0 ||",
        "(!MUTANT(30) && word.is_entering()) || (word.pending() >> g & 1) == 0 ||",
        ("only-group-leaves",),
    ),
    Mutant(
        31,
        "sweep: a message that somebody holds is released",
        "liveness/membership.cpp",
        "!(claim.is_open() || claim.who() == Claim::kDiscard)",
        "!(MUTANT(31) || claim.is_open() || claim.who() == Claim::kDiscard)",
        ("group-leaves-holding",),
    ),
    Mutant(
        32,
        "sweep: the bit is cleared without the claim",
        "liveness/membership.cpp",
        "      if (!region_->claim(s, g).compare_exchange_strong(claim.bits, taken.bits, std::memory_order_acq_rel))\n",
        "      if (!MUTANT(32) &&\n"
        "          !region_->claim(s, g).compare_exchange_strong(claim.bits, taken.bits, std::memory_order_acq_rel))\n",
        ("group-leaves-holding", "drop-oldest-leave"),
    ),
    Mutant(
        33,
        "late join: the bit is added to whatever word is there",
        "liveness/membership.cpp",
        "      const std::uint32_t generation = word.generation();\n",
        "      const std::uint32_t generation = word.generation();\n"
        "      if (MUTANT(33)) {\n"
        "        region_->slot(s).word.fetch_or(std::uint64_t{1} << group);\n"
        "        break;\n"
        "      }\n",
        ("join-oldest",),
    ),
    Mutant(
        34,
        "late join: the bit comes without a claim",
        "liveness/membership.cpp",
        "    if (!claim.compare_exchange_strong(before.bits, open.bits, std::memory_order_acq_rel)) continue;\n",
        "    if (!MUTANT(34) && !claim.compare_exchange_strong(before.bits, open.bits, std::memory_order_acq_rel))\n"
        "      continue;\n",
        ("join-oldest",),
    ),
    Mutant(
        35,
        "late join: the position is loaded a second time",
        "liveness/membership.cpp",
        "    const std::int64_t ahead = slots::distance(position & slots::kPositionMask, first);\n"
        "    if (!found || (start == JoinAt::Oldest ? ahead < 0 : ahead > 0)) first = position;\n",
        "    const std::int64_t ahead = slots::distance(position & slots::kPositionMask, first);\n"
        "    if (!found || (start == JoinAt::Oldest ? ahead < 0 : ahead > 0)) first = position;\n"
        "    if (MUTANT(35) && first == position) first = region_->slot(s).position.load();\n",
        ("join-oldest",),
    ),
    Mutant(
        36,
        "take: the slot's position is not looked at",
        "order/group.hpp",
        "    // until its sender has entered it the message that is there now carries that claim.\n"
        "    if (region_->slot(s).position.load(std::memory_order_acquire) != position) return false;\n",
        "    if (!MUTANT(36) && region_->slot(s).position.load(std::memory_order_acquire) != position) return false;\n",
        ("join-latest-history",),
    ),
    Mutant(
        37,
        "drop oldest: what somebody has is dropped too",
        "delivery/publication.hpp",
        "        if (group.try_discard_at(slot, oldest, me, !is_joining(group))) finish_drop(group, slot);\n",
        "        if (MUTANT(37) && !group.try_discard_at(slot, oldest, me, !is_joining(group))) finish_drop(group, slot);\n"
        "        if (group.try_discard_at(slot, oldest, me, !is_joining(group))) finish_drop(group, slot);\n",
        ("drop-oldest", "drop-oldest-groups"),
    ),
    Mutant(
        38,
        "drop oldest: one group's copy is enough",
        "delivery/publication.hpp",
        "      for_each(active, [&](order::Group group) {\n        if (MUTANT(37)",
        "      for_each(active, [&](order::Group group) {\n        if (MUTANT(38) && group.number() != 0) return false;\n        if (MUTANT(37)",
        ("drop-oldest-groups",),
    ),
    Mutant(
        39,
        "recovery leaves what the dead one was about to drop",
        "liveness/recovery.cpp",
        "    if (claim.who() == Claim::discarder(d)) {\n",
        "    if (claim.who() == Claim::discarder(d) && !MUTANT(39)) {\n",
        ("drop-oldest-kill",),
    ),
    Mutant(
        40,
        "the history keeps one more",
        "delivery/publication.hpp",
        "cursor) < most || !drop_history(me)) return;\n",
        "cursor) < most + MUTANT(40) || !drop_history(me)) return;\n",
        ("history-kill",),
    ),
    Mutant(
        41,
        "a message is delivered more often than the channel allows",
        "delivery/dead_letters.hpp",
        "      if (held.attempts < region_->rules().max_deliveries) [[likely]] {\n",
        "      if (held.attempts < region_->rules().max_deliveries || MUTANT(41)) [[likely]] {\n",
        ("dead-letters",),
    ),
    Mutant(
        42,
        "a dead letter that has to go is released without its claim",
        "delivery/dead_letters.hpp",
        "      if (!try_claim(oldest, slots::Claim::discarder(me))) continue;\n",
        "      if (!try_claim(oldest, slots::Claim::discarder(me)) && !MUTANT(42)) continue;\n",
        ("dead-letters-full",),
    ),
    Mutant(
        43,
        "a reader takes a dead letter by a store",
        "delivery/dead_letters.hpp",
        "      if (!try_claim(oldest, slots::Claim::holder(me))) continue;\n",
        "      if (MUTANT(43)) {\n"
        "        region_->claim(oldest.slot, oldest.group)\n"
        "            .store(oldest.claim.with(oldest.claim.attempts(), slots::Claim::holder(me)).bits);\n"
        "      } else if (!try_claim(oldest, slots::Claim::holder(me))) {\n"
        "        continue;\n"
        "      }\n",
        ("dead-letters-two-readers",),
    ),
    Mutant(
        44,
        "what a dead member of a dropping group held is delivered again",
        "liveness/recovery.cpp",
        "    if ((active >> g & 1) == 0 || drops) {\n",
        "    if ((active >> g & 1) == 0 || (drops && !MUTANT(44))) {\n",
        ("drop-policy-two-recoverers",),
    ),
    Mutant(
        45,
        "V9: the group of a dead viewer stays",
        "liveness/membership.cpp",
        "        has_members(g, except))\n      continue;\n",
        "        has_members(g, except) || MUTANT(45))\n      continue;\n",
        ("group-dies",),
    ),
    Mutant(
        46,
        "alloc does not look for slots that the map lacks",
        "slots/slot_pool.hpp",
        "      if (try_alloc_at(s, me)) return s;\n      SlotWord seen = word(s);\n",
        "      if (!MUTANT(46) && try_alloc_at(s, me)) return s;\n      SlotWord seen = word(s);\n",
        ("one-slot-kill",),
    ),
    Mutant(
        47,
        "publish: ENQ is cleared although the publisher still looks at the message",
        "delivery/publication.hpp",
        "    if (keep) {\n      pool_->keep(s);\n      DSLINE_POINT",
        "    if (keep && !MUTANT(47)) {\n      pool_->keep(s);\n      DSLINE_POINT",
        ("kept-view",),
    ),
    Mutant(
        48,
        "publish: a message that nobody listens for is free although its publisher still looks at it",
        "slots/slot_pool.hpp",
        "groups == 0 && !keep ?",
        "groups == 0 && (!keep || MUTANT(48)) ?",
        ("kept-view-unheard",),
    ),
    Mutant(
        49,
        "recovery: the view of a dead publisher stays",
        "liveness/recovery.cpp",
        "  if (word.is_kept()) {\n",
        "  if (MUTANT(49) && word.is_kept()) return;\n  if (word.is_kept()) {\n",
        ("kept-view-kill",),
    ),
    Mutant(
        50,
        "the last view ends without a wake-up for room",
        "slots/slot_pool.hpp",
        "      if (without.pending() == 0) free(s);\n      return;",
        "      if (without.pending() == 0 && !(MUTANT(50) && seen.is_kept())) free(s);\n      return;",
        ("kept-view-sleep",),
    ),
    Mutant(
        61,
        "who takes nothing keeps the wake-up",
        "order/group.hpp",
        "    if (anything_waiting()) messages_.wake_one_if_anyone();\n",
        "    if (anything_waiting() && !MUTANT(61)) messages_.wake_one_if_anyone();\n",
        ("sleep-watched",),
    ),
]


def applied(source: pathlib.Path, target: pathlib.Path) -> list[str]:
    """Copies the core's sources with every change made in the copy; says which could not be made."""
    mistakes = []
    texts = {p.relative_to(source).as_posix(): p.read_text() for p in source.rglob("*") if p.is_file()}
    for mutant in MUTANTS:
        for file, search, replace in [(mutant.file, mutant.search, mutant.replace), *mutant.more]:
            found = texts.get(file, "").count(search)
            if found != 1 or f"MUTANT({mutant.number})" not in replace:
                mistakes.append(
                    f"mutant {mutant.number} ({mutant.name}): its place occurs {found} times in {file}"
                )
            else:
                texts[file] = texts[file].replace(search, replace)
    for name, text in texts.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return mistakes
