#pragma once

#pragma GCC diagnostic ignored "-Wtautological-compare"

/// Included before everything in the build that has the seeded mistakes of mutants.py in it.
extern int dsline_mutant;
#define MUTANT(n) (!__builtin_is_constant_evaluated() && dsline_mutant == (n))
