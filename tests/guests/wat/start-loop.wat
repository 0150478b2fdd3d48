;; Spins while it is instantiated, before there is an entrypoint to call: Kill must reach it there as well.
(module
  (memory (export "memory") 1)
  (func $spin (loop $again (br $again)))
  (start $spin)
  (func (export "_start")))
