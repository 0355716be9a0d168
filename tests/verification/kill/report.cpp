#include "report.hpp"

#include <cinttypes>
#include <cstdio>
#include <memory>

#include "plan.hpp"
#include "points.hpp"

namespace dsline::kill {
namespace {

constexpr double kPromisedMs = 250;

void add(Tally& sum, const Tally& lane) {
  for (std::uint32_t s = 0; s < kMostShapes; ++s) {
    sum.rounds[s] += lane.rounds[s];
    sum.kills[s] += lane.kills[s];
    for (std::uint32_t r = 0; r < kRoles; ++r) {
      sum.lives[s][r] += lane.lives[s][r];
      for (std::uint32_t p = 0; p < kMaxPoints; ++p) sum.hits[s][r][p] += lane.hits[s][r][p].load();
    }
  }
  for (std::uint32_t p = 0; p < kMaxPoints; ++p) sum.killed_at[p] += lane.killed_at[p];
  sum.stops += lane.stops;
  sum.sent += lane.sent;
  sum.received += lane.received;
  sum.redelivered += lane.redelivered;
  sum.given_back += lane.given_back;
  sum.rolled_forward += lane.rolled_forward;
  sum.dropped += lane.dropped;
  sum.letters += lane.letters;
  sum.old_messages += lane.old_messages;
  sum.looks += lane.looks;
  sum.refused += lane.refused;
  sum.lost += lane.lost;
  sum.torn += lane.torn;
  sum.duplicated += lane.duplicated;
  sum.disordered += lane.disordered;
  sum.leaked += lane.leaked;
  sum.stuck += lane.stuck;
  sum.other += lane.other;
  sum.killed_at_random += lane.killed_at_random;
  sum.recovery_by_newcomers.add(lane.recovery_by_newcomers);
  sum.recovery_by_waiters.add(lane.recovery_by_waiters);
  sum.recovery_in_stream.add(lane.recovery_in_stream);
  sum.redelivery.add(lane.redelivery);
}

std::uint64_t hits_of(const Tally& sum, std::uint32_t point) {
  std::uint64_t hits = 0;
  for (std::uint32_t s = 0; s < kShapes; ++s) {
    for (std::uint32_t r = 0; r < kRoles; ++r) hits += sum.hits[s][r][point];
  }
  return hits;
}

void print_times(const char* what, const Times& times) {
  std::printf("%-34s %8" PRIu64 " measured  p50 %6.2f  p99 %6.2f  longest %7.2f ms\n", what, times.count,
              times.quantile_ms(0.5), times.quantile_ms(0.99), static_cast<double>(times.longest_ns) / 1e6);
}

void write_times(FILE* file, const char* name, const Times& times, const char* end) {
  std::fprintf(file,
               "  \"%s\": {\"count\": %" PRIu64
               ", \"p50_ms\": %.2f, \"p99_ms\": %.2f, \"longest_ms\": %.2f}%s\n",
               name, times.count, times.quantile_ms(0.5), times.quantile_ms(0.99),
               static_cast<double>(times.longest_ns) / 1e6, end);
}

std::uint64_t violations_of(const Tally& sum) {
  return sum.lost + sum.torn + sum.duplicated + sum.disordered + sum.leaked + sum.stuck + sum.other;
}

bool write_json(const Options& options, const Tally& sum, std::uint64_t kills, std::uint32_t unhit,
                double seconds, bool good) {
  FILE* file = std::fopen(options.json.c_str(), "we");
  if (file == nullptr) {
    std::perror(options.json.c_str());
    return false;
  }
  std::fprintf(
      file, "{\n  \"seed\": %" PRIu64 ",\n  \"seconds\": %.1f,\n  \"good\": %s,\n  \"kills\": %" PRIu64 ",\n",
      options.seed, seconds, good ? "true" : "false", kills);
  std::fprintf(file,
               "  \"violations\": %" PRIu64 ",\n  \"labels_with_a_death\": %u,\n  \"labels_without\": %u,\n",
               violations_of(sum), point_count() - unhit, unhit);
  std::fprintf(file, "  \"recovery_p99_ms\": %.1f,\n  \"redelivery_p99_ms\": %.1f,\n",
               sum.recovery_by_waiters.quantile_ms(0.99), sum.redelivery.quantile_ms(0.99));
  std::fprintf(file,
               "  \"kills_at_random_times\": %" PRIu64 ",\n  \"stops\": %" PRIu64 ",\n  \"sent\": %" PRIu64
               ",\n  \"received\": %" PRIu64 ",\n  \"redelivered\": %" PRIu64 ",\n  \"given_back\": %" PRIu64
               ",\n  \"rolled_forward\": %" PRIu64 ",\n  \"dropped\": %" PRIu64
               ",\n  \"dead_letters\": %" PRIu64 ",\n  \"older_messages\": %" PRIu64
               ",\n  \"looks\": %" PRIu64 ",\n  \"refused\": %" PRIu64 ",\n",
               sum.killed_at_random, sum.stops, sum.sent, sum.received, sum.redelivered, sum.given_back,
               sum.rolled_forward, sum.dropped, sum.letters, sum.old_messages, sum.looks, sum.refused);
  std::fprintf(file,
               "  \"violations_by_kind\": {\"lost\": %" PRIu64 ", \"torn\": %" PRIu64
               ", \"duplicated\": %" PRIu64 ", \"disordered\": %" PRIu64 ", \"leaked\": %" PRIu64
               ", \"stuck\": %" PRIu64 ", \"other\": %" PRIu64 "},\n",
               sum.lost, sum.torn, sum.duplicated, sum.disordered, sum.leaked, sum.stuck, sum.other);
  write_times(file, "recovery_by_newcomers", sum.recovery_by_newcomers, ",");
  write_times(file, "recovery_by_waiters", sum.recovery_by_waiters, ",");
  write_times(file, "recovery_in_stream", sum.recovery_in_stream, ",");
  write_times(file, "redelivery", sum.redelivery, ",");
  std::fprintf(file, "  \"by_shape\": {");
  for (std::uint32_t s = 0; s < kShapes; ++s) {
    std::fprintf(file, "%s\n    \"%s\": {\"rounds\": %" PRIu64 ", \"kills\": %" PRIu64 "}", s == 0 ? "" : ",",
                 shape_name(s), sum.rounds[s], sum.kills[s]);
  }
  std::fprintf(file, "\n  },\n  \"by_label\": {");
  for (std::uint32_t p = 0; p < point_count(); ++p) {
    std::fprintf(file, "%s\n    \"%s\": {\"hits\": %" PRIu64 ", \"kills\": %" PRIu64 "}", p == 0 ? "" : ",",
                 point_name(p), hits_of(sum, p), sum.killed_at[p]);
  }
  std::fprintf(file, "\n  }\n}\n");
  return std::fclose(file) == 0;
}

}  // namespace

bool report(const Options& options, const std::vector<const Tally*>& lanes, double seconds) {
  auto sum = std::make_unique<Tally>();
  for (const Tally* lane : lanes) add(*sum, *lane);
  std::uint64_t kills = 0;
  bool good = true;

  std::printf("\n%-20s %8s %9s %9s\n", "shape", "rounds", "kills", "processes");
  for (std::uint32_t s = 0; s < kShapes; ++s) {
    std::uint64_t lives = 0;
    for (std::uint32_t r = 0; r < kRoles; ++r) lives += sum->lives[s][r];
    std::printf("%-20s %8" PRIu64 " %9" PRIu64 " %9" PRIu64 "\n", shape_name(s), sum->rounds[s],
                sum->kills[s], lives);
    kills += sum->kills[s];
  }

  std::printf("\n%-34s %12s %9s\n", "label", "hits", "kills");
  const bool is_whole = options.shape >= kShapes && options.round == ~0ull;
  std::uint32_t unhit = 0;
  for (std::uint32_t p = 0; p < point_count(); ++p) {
    const bool missing = sum->killed_at[p] == 0;
    unhit += missing;
    std::printf("%-34s %12" PRIu64 " %9" PRIu64 "%s\n", point_name(p), hits_of(*sum, p), sum->killed_at[p],
                missing ? "  <- no death here" : "");
  }
  std::printf("%-34s %12s %9" PRIu64 "\n\n", "(at random times)", "", sum->killed_at_random);

  print_times("recovery by a process that joins", sum->recovery_by_newcomers);
  print_times("recovery by those who were there", sum->recovery_by_waiters);
  print_times("  of these in a steady stream", sum->recovery_in_stream);
  print_times("redelivery", sum->redelivery);
  std::printf("\n%" PRIu64 " kills and %" PRIu64 " stops in %.1f s: %" PRIu64 " sent, %" PRIu64
              " received, %" PRIu64 " of them again, %" PRIu64 " given back, %" PRIu64
              " delivered for a dead sender, %" PRIu64 " dropped\n",
              kills, sum->stops, seconds, sum->sent, sum->received, sum->redelivered, sum->given_back,
              sum->rolled_forward, sum->dropped);
  std::printf("%" PRIu64 " dead letters taken, %" PRIu64 " older messages received by viewers, %" PRIu64
              " looks at the newest message, %" PRIu64 " viewers found no number left\n",
              sum->letters, sum->old_messages, sum->looks, sum->refused);
  std::printf("lost %" PRIu64 ", torn %" PRIu64 ", duplicated %" PRIu64 ", out of order %" PRIu64
              ", leaked %" PRIu64 ", stuck %" PRIu64 ", other %" PRIu64 "\n",
              sum->lost, sum->torn, sum->duplicated, sum->disordered, sum->leaked, sum->stuck, sum->other);

  if (violations_of(*sum) != 0) good = false;
  if (kills == 0 || sum->received == 0) {
    std::printf("FAILED: nothing happened\n");
    good = false;
  }
  if (is_whole && kills >= 5000) {
    if (sum->letters == 0 || sum->old_messages == 0 || sum->looks == 0 || sum->rolled_forward == 0) {
      std::printf("FAILED: something that should happen never did\n");
      good = false;
    }
    if (unhit != 0) {
      std::printf("FAILED: %u labels without a death\n", unhit);
      good = false;
    }
    for (const Times* times : {&sum->recovery_by_newcomers, &sum->recovery_by_waiters,
                               &sum->recovery_in_stream, &sum->redelivery}) {
      if (times->count < 20) {
        std::printf("FAILED: too few recoveries were measured\n");
        good = false;
      }
      if (times->quantile_ms(0.99) > kPromisedMs) {
        std::printf("FAILED: 99 %% of the recoveries must be over within %.0f ms\n", kPromisedMs);
        good = false;
      }
    }
  }
  if (!options.json.empty() && !write_json(options, *sum, kills, unhit, seconds, good)) good = false;
  std::printf("%s (seed %" PRIu64 ")\n", good ? "ok" : "FAILED", options.seed);
  return good;
}

}  // namespace dsline::kill
