;; The same for a component: its error names `troupe:nobody/home@1.0.0`.
(component
  (import "troupe:nobody/home@1.0.0" (instance $home (export "knock" (func))))
  (core func $knock (canon lower (func $home "knock")))
  (core module $code
    (import "home" "knock" (func $knock))
    (func (export "run") (result i32) (call $knock) (i32.const 0)))
  (core instance $code (instantiate $code (with "home" (instance (export "knock" (func $knock))))))
  (func $run (result (result)) (canon lift (core func $code "run")))
  (instance $command (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $command)))
