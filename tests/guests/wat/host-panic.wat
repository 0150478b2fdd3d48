;; Calls the host function that panics; only test builds of the shim provide it.
(module
  (import "troupe_test" "panic" (func $panic))
  (memory (export "memory") 1)
  (func (export "_start") (call $panic)))
