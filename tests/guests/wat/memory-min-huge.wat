;; Wants 4 GiB from the start: over every limit, so an error of Start or the end for lack of memory, never a crash.
(module
  (memory (export "memory") 65536)
  (func (export "_start")))
