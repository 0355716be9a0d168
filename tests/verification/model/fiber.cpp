#include "fiber.hpp"

#if !defined(__x86_64__)
#error "the model checker switches stacks on x86-64 only"
#endif

asm(R"(
.text
.globl dsline_model_switch
.type dsline_model_switch, @function
dsline_model_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size dsline_model_switch, . - dsline_model_switch
.section .note.GNU-stack,"",@progbits
.text
)");
