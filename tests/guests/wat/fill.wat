;; Fills 512 MiB again and again: one instruction that no tick can interrupt.
(module
  (memory (export "memory") 8192)
  (func (export "_start")
    (loop $again
      (memory.fill (i32.const 0) (i32.const 1) (i32.const 0x20000000))
      (br $again))))
