#include "simulation.hpp"

namespace dsline::model {
namespace {

Role producer(int messages) { return {.kind = Kind::Producer, .messages = messages}; }
Role consumer(int group = 0, int nacks = 0) { return {.kind = Kind::Consumer, .group = group, .nacks = nacks}; }
Role recoverer() { return {.kind = Kind::Recoverer}; }

}  // namespace

const std::vector<Setup>& setups() {
  static const std::vector<Setup> list = {
      {.name = "one-to-one", .what = "1 producer x 2, 1 consumer", .roles = {producer(2), consumer()}},
      {.name = "two-to-one", .what = "2 producers, 1 consumer", .roles = {producer(1), producer(1), consumer()}},
      {.name = "two-to-one-kill",
       .what = "2 producers, 1 consumer, recoverer, 1 kill",
       .kills = 1,
       .roles = {producer(1), producer(1), consumer(), recoverer()}},
      {.name = "two-consumers-kill",
       .what = "1 producer x 2, 2 consumers, recoverer, 1 kill",
       .kills = 1,
       .roles = {producer(2), consumer(), consumer(), recoverer()}},
      {.name = "two-by-two-kill",
       .what = "2 producers, 2 consumers, recoverer, 1 kill",
       .kills = 1,
       .roles = {producer(1), producer(1), consumer(), consumer(), recoverer()}},
  };
  return list;
}

}  // namespace dsline::model
