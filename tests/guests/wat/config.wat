;; A component whose `run` asks wasi:config for GREETING: exit code 0 if it is there and is "hello", else 1.
(component
  (import "wasi:config/store@0.2.0-rc.1" (instance $store
    (type $e (variant (case "upstream" string) (case "io" string)))
    (export "error" (type $error (eq $e)))
    (export "get" (func (param "key" string) (result (result (option string) (error $error)))))))
  (alias export $store "get" (func $get))

  (core module $libc
    (memory (export "memory") 1)
    (global $free (mut i32) (i32.const 1024))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (global.get $free)
      (global.set $free (i32.add (global.get $free) (local.get 3)))))
  (core instance $libc (instantiate $libc))
  (core func $get (canon lower (func $get) (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))

  (core module $code
    (import "libc" "memory" (memory 1))
    (import "store" "get" (func $get (param i32 i32 i32)))
    (data (i32.const 0) "GREETING")
    (data (i32.const 16) "hello")
    (func (export "run") (result i32)
      (local $at i32)
      ;; The result at 64: ok, then some at 68, then where it is at 72 and how long at 76.
      (call $get (i32.const 0) (i32.const 8) (i32.const 64))
      (if (i32.load8_u (i32.const 64)) (then (return (i32.const 1))))
      (if (i32.ne (i32.load8_u (i32.const 68)) (i32.const 1)) (then (return (i32.const 1))))
      (if (i32.ne (i32.load (i32.const 76)) (i32.const 5)) (then (return (i32.const 1))))
      (local.set $at (i32.load (i32.const 72)))
      (i32.or
        (i32.ne (i32.load (local.get $at)) (i32.load (i32.const 16)))
        (i32.ne (i32.load8_u offset=4 (local.get $at)) (i32.load8_u (i32.const 20))))))
  (core instance $code (instantiate $code
    (with "libc" (instance $libc))
    (with "store" (instance (export "get" (func $get))))))
  (func $run (result (result)) (canon lift (core func $code "run")))
  (instance $command (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $command)))
