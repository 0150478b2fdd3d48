//! A command for WASI 0.3 (`wasi:cli/run`): its arguments on stdout, one a line, argv[0] first, and then the end that
//! the last of them asks for.
//!
//!     cli3 [WORD...] [CODE]      exit code CODE, 0 where the last word is no number up to 255
//!
//! 0 and 1 are what `run` returns, the others `exit-with-code`. When stdout cannot take it all, the code is 1.
use realloc as _;
use wasip3::cli::{environment, exit, stdout};
use wasip3::wit_stream;

wasip3::cli::command::export!(Command);

struct Command;

impl wasip3::exports::cli::run::Guest for Command {
    async fn run() -> Result<(), ()> {
        let arguments = environment::get_arguments();
        let mut lines = arguments.join("\n").into_bytes();
        lines.push(b'\n');
        print(lines).await?;
        match arguments.last().and_then(|last| last.parse().ok()) {
            None | Some(0) => Ok(()),
            Some(1) => Err(()),
            Some(code) => {
                exit::exit_with_code(code);
                Err(())
            }
        }
    }
}

async fn print(text: Vec<u8>) -> Result<(), ()> {
    let (mut writer, reader) = wit_stream::new();
    let written = stdout::write_via_stream(reader);
    let left = writer.write_all(text).await;
    drop(writer);
    written.await.map_err(drop)?;
    if left.is_empty() { Ok(()) } else { Err(()) }
}
