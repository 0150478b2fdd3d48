;; Needs a function that nobody provides: an error at Create or Start that names `env` and `nobody`.
(module
  (import "env" "nobody" (func $nobody))
  (memory (export "memory") 1)
  (func (export "_start") (call $nobody)))
