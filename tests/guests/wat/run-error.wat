;; A component whose `run` returns an error: exit code 1.
(component
  (core module $code (func (export "run") (result i32) (i32.const 1)))
  (core instance $code (instantiate $code))
  (func $run (result (result)) (canon lift (core func $code "run")))
  (instance $command (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $command)))
