;; Prints what `initial-cwd` says and a newline, or `none`. In preview 1 there is no such question: a module, and a
;; component made of one, always believes to be in `/`.
(component
  (import "wasi:cli/environment@0.2.0" (instance $environment
    (export "initial-cwd" (func (result (option string))))))
  (import "wasi:io/error@0.2.0" (instance $error-of-io (export "error" (type (sub resource)))))
  (alias export $error-of-io "error" (type $error))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (export "output-stream" (type $stream (sub resource)))
    (alias outer 1 $error (type $outer-error))
    (export "error" (type $io-error (eq $outer-error)))
    (type $failure (variant (case "last-operation-failed" (own $io-error)) (case "closed")))
    (export "stream-error" (type $stream-error (eq $failure)))
    (export "[method]output-stream.blocking-write-and-flush" (func
      (param "self" (borrow $stream)) (param "contents" (list u8)) (result (result (error $stream-error)))))))
  (alias export $streams "output-stream" (type $output))
  (import "wasi:cli/stdout@0.2.0" (instance $stdout
    (alias outer 1 $output (type $outer-output))
    (export "output-stream" (type $stream (eq $outer-output)))
    (export "get-stdout" (func (result (own $stream))))))

  (core module $libc
    (memory (export "memory") 1)
    ;; Asked once, for the string: it goes where the second KiB begins.
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 1024)))
  (core instance $libc (instantiate $libc))
  (alias core export $libc "memory" (core memory $memory))
  (alias core export $libc "realloc" (core func $realloc))
  (core func $cwd (canon lower (func $environment "initial-cwd")
    (memory (core memory $memory)) (realloc (core func $realloc)) string-encoding=utf8))
  (core func $get-stdout (canon lower (func $stdout "get-stdout")))
  (core func $write (canon lower (func $streams "[method]output-stream.blocking-write-and-flush")
    (memory (core memory $memory))))

  (core module $code
    (import "libc" "memory" (memory 1))
    (import "wasi" "cwd" (func $cwd (param i32)))
    (import "wasi" "get-stdout" (func $get-stdout (result i32)))
    (import "wasi" "write" (func $write (param i32 i32 i32 i32)))
    (data (i32.const 512) "none\n")
    ;; The option lies at 0 (0 = none), its string's address at 4 and length at 8; the outcome of the write at 16.
    (func (export "run") (result i32)
      (local $length i32)
      (call $cwd (i32.const 0))
      (if (i32.load8_u (i32.const 0))
        (then
          (local.set $length (i32.load (i32.const 8)))
          (i32.store8 (i32.add (i32.load (i32.const 4)) (local.get $length)) (i32.const 10))
          (call $write (call $get-stdout) (i32.load (i32.const 4))
            (i32.add (local.get $length) (i32.const 1)) (i32.const 16)))
        (else
          (call $write (call $get-stdout) (i32.const 512) (i32.const 5) (i32.const 16))))
      (i32.load8_u (i32.const 16))))
  (core instance $code (instantiate $code
    (with "libc" (instance $libc))
    (with "wasi" (instance
      (export "cwd" (func $cwd)) (export "get-stdout" (func $get-stdout)) (export "write" (func $write))))))
  (func $run (result (result)) (canon lift (core func $code "run")))
  (instance $command (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $command)))
