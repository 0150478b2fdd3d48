;; Sleeps for ever in host calls, an hour each, with one page of memory: the least a living container can be.
(module
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  ;; A subscription at 0: userdata u64, tag u8 (0 = clock), at 16 the clock u32 (1 = monotonic), at 24 timeout,
  ;; at 32 precision u64, at 40 flags u16 (0 = relative). Events go to 64.
  (data (i32.const 16) "\01")
  (func (export "_start")
    (i64.store (i32.const 24) (i64.const 3600000000000))
    (loop $again
      (drop (call $poll (i32.const 0) (i32.const 64) (i32.const 1) (i32.const 128)))
      (br $again))))
