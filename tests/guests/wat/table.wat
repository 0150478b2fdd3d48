;; A server whose program has a table of functions, as no Rust program can use one. Each request looks at every slot, then
;; fills them all, lets the table grow and fills the rest, and answers without a body:
;;
;;     200    the table was as the program begins      410    a slot held what it should not
;;     409    it had another size                      411    both
;;     507    it cannot grow
;;
;; 20 000 slots, with the growth 50 000: more than the pool keeps in memory, on both sides of where it begins.
(component
  (import "wasi:http/types@0.2.0" (instance $types
    (export "fields" (type $fields (sub resource)))
    (export "incoming-request" (type $request (sub resource)))
    (export "outgoing-response" (type $response (sub resource)))
    (export "response-outparam" (type $out (sub resource)))
    (type $dns-error (record (field "rcode" (option string)) (field "info-code" (option u16))))
    (export "DNS-error-payload" (type $dns (eq $dns-error)))
    (type $tls-alert (record (field "alert-id" (option u8)) (field "alert-message" (option string))))
    (export "TLS-alert-received-payload" (type $tls (eq $tls-alert)))
    (type $field-size (record (field "field-name" (option string)) (field "field-size" (option u32))))
    (export "field-size-payload" (type $field (eq $field-size)))
    ;; None of them is ever told; the host wants to see all the same.
    (type $codes (variant
      (case "DNS-timeout")
      (case "DNS-error" $dns)
      (case "destination-not-found")
      (case "destination-unavailable")
      (case "destination-IP-prohibited")
      (case "destination-IP-unroutable")
      (case "connection-refused")
      (case "connection-terminated")
      (case "connection-timeout")
      (case "connection-read-timeout")
      (case "connection-write-timeout")
      (case "connection-limit-reached")
      (case "TLS-protocol-error")
      (case "TLS-certificate-error")
      (case "TLS-alert-received" $tls)
      (case "HTTP-request-denied")
      (case "HTTP-request-length-required")
      (case "HTTP-request-body-size" (option u64))
      (case "HTTP-request-method-invalid")
      (case "HTTP-request-URI-invalid")
      (case "HTTP-request-URI-too-long")
      (case "HTTP-request-header-section-size" (option u32))
      (case "HTTP-request-header-size" (option $field))
      (case "HTTP-request-trailer-section-size" (option u32))
      (case "HTTP-request-trailer-size" $field)
      (case "HTTP-response-incomplete")
      (case "HTTP-response-header-section-size" (option u32))
      (case "HTTP-response-header-size" $field)
      (case "HTTP-response-body-size" (option u64))
      (case "HTTP-response-trailer-section-size" (option u32))
      (case "HTTP-response-trailer-size" $field)
      (case "HTTP-response-transfer-coding" (option string))
      (case "HTTP-response-content-coding" (option string))
      (case "HTTP-response-timeout")
      (case "HTTP-upgrade-failed")
      (case "HTTP-protocol-error")
      (case "loop-detected")
      (case "configuration-error")
      (case "internal-error" (option string))))
    (export "error-code" (type $error (eq $codes)))
    (export "[constructor]fields" (func (result (own $fields))))
    (export "[constructor]outgoing-response" (func (param "headers" (own $fields)) (result (own $response))))
    (export "[method]outgoing-response.set-status-code"
      (func (param "self" (borrow $response)) (param "status-code" u16) (result (result))))
    (export "[static]response-outparam.set"
      (func (param "param" (own $out)) (param "response" (result (own $response) (error $error)))))))
  (alias export $types "incoming-request" (type $request))
  (alias export $types "response-outparam" (type $out))
  (alias export $types "[constructor]fields" (func $fields))
  (alias export $types "[constructor]outgoing-response" (func $response))
  (alias export $types "[method]outgoing-response.set-status-code" (func $set-status))
  (alias export $types "[static]response-outparam.set" (func $set))

  (core module $libc (memory (export "memory") 1))
  (core instance $libc (instantiate $libc))
  (core func $drop-request (canon resource.drop $request))
  (core func $fields (canon lower (func $fields)))
  (core func $response (canon lower (func $response)))
  (core func $set-status (canon lower (func $set-status)))
  ;; Errors hold strings, so there has to be a memory.
  (core func $set (canon lower (func $set) (memory (core memory $libc "memory"))))

  (core module $code
    (type $number (func (result i32)))
    (import "http" "drop-request" (func $drop-request (param i32)))
    (import "http" "fields" (func $fields (result i32)))
    (import "http" "response" (func $response (param i32) (result i32)))
    (import "http" "set-status" (func $set-status (param i32 i32) (result i32)))
    (import "http" "set" (func $set (param i32 i32 i32 i32 i64 i32 i32 i32 i32)))
    (table $slots 20000 funcref)
    ;; Two slots are taken from the start, far from each other; the others are null.
    (elem (table $slots) (i32.const 1) func $own)
    (elem (table $slots) (i32.const 19998) func $own)
    (elem declare func $other)
    (func $own (type $number) (i32.const 1))
    (func $other (type $number) (i32.const 2))

    ;; 1: its size is not what it should be; 2: what is in it.
    (func $look (result i32)
      (local $slot i32) (local $wrong i32)
      (loop $next
        (if (i32.or (i32.eq (local.get $slot) (i32.const 1)) (i32.eq (local.get $slot) (i32.const 19998)))
          (then
            (if (call $is-own (local.get $slot)) (then) (else (local.set $wrong (i32.const 2)))))
          (else
            (if (ref.is_null (table.get $slots (local.get $slot))) (then) (else (local.set $wrong (i32.const 2))))))
        (local.set $slot (i32.add (local.get $slot) (i32.const 1)))
        (br_if $next (i32.lt_u (local.get $slot) (i32.const 20000))))
      (i32.or (local.get $wrong) (i32.ne (table.size $slots) (i32.const 20000))))

    (func $is-own (param $slot i32) (result i32)
      (if (ref.is_null (table.get $slots (local.get $slot))) (then (return (i32.const 0))))
      (i32.eq (call_indirect $slots (type $number) (local.get $slot)) (i32.const 1)))

    (func $leave (result i32)
      (table.fill $slots (i32.const 0) (ref.func $other) (table.size $slots))
      (table.grow $slots (ref.func $other) (i32.const 30000)))

    (func (export "handle") (param $request i32) (param $out i32)
      (local $status i32) (local $response i32)
      (call $drop-request (local.get $request))
      (local.set $status (i32.add (i32.const 408) (call $look)))
      (if (i32.eq (local.get $status) (i32.const 408)) (then (local.set $status (i32.const 200))))
      (if (i32.eq (call $leave) (i32.const -1)) (then (local.set $status (i32.const 507))))
      (local.set $response (call $response (call $fields)))
      (drop (call $set-status (local.get $response) (local.get $status)))
      (call $set (local.get $out) (i32.const 0) (local.get $response)
        (i32.const 0) (i64.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0))))
  (core instance $code (instantiate $code
    (with "http" (instance
      (export "drop-request" (func $drop-request))
      (export "fields" (func $fields))
      (export "response" (func $response))
      (export "set-status" (func $set-status))
      (export "set" (func $set))))))
  (func $handle (param "request" (own $request)) (param "response-out" (own $out))
    (canon lift (core func $code "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler)))
