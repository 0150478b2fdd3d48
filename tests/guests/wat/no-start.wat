;; Exports nothing to begin with: an error that says so.
(module
  (memory (export "memory") 1))
