;; Its `_start` wants an argument, which no command's does: an error that says so.
(module
  (memory (export "memory") 1)
  (func (export "_start") (param i32)))
