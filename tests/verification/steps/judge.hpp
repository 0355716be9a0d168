#pragma once

#include <functional>
#include <string>
#include <vector>

#include "scene.hpp"

namespace dsline::steps {

/// Lets a survivor join the region behind `fd` as a death left it, takes everything that is to be had, and compares.
/// `bystander_dies` ends the life of the bystander. Moves `items` forward; "" when all is as it should be.
std::string judge(int fd, std::vector<Item>& items, const std::function<void()>& bystander_dies,
                  const Scene& scene);

/// The same with a copy of the region in which the bystander lives and nobody else.
std::string judge_copy(const std::vector<std::byte>& bytes, std::vector<Item>& items, const Scene& scene);

/// For the end of the act: everything has come to where it had to come.
std::string judge_end(const std::vector<Item>& items);

}  // namespace dsline::steps
