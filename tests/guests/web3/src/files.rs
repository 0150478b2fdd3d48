//! Files, by the host's asynchronous calls.
use wasip3::filesystem::preopens::get_directories;
use wasip3::filesystem::types::{Descriptor, DescriptorFlags, ErrorCode, OpenFlags, PathFlags};
use wasip3::http::types::Response;

use crate::answer::text;

pub async fn read(query: &str) -> Response {
    answer(content(query).await)
}

pub async fn make(query: &str) -> Response {
    let made = match root() {
        Some(root) => root.create_directory_at(path(query)).await.map(|()| b"made\n".to_vec()),
        None => Err(ErrorCode::NoEntry),
    };
    answer(made)
}

async fn content(query: &str) -> Result<Vec<u8>, ErrorCode> {
    let root = root().ok_or(ErrorCode::NoEntry)?;
    let (links, open, read) = (PathFlags::SYMLINK_FOLLOW, OpenFlags::empty(), DescriptorFlags::READ);
    let file = root.open_at(links, path(query), open, read).await?;
    let (stream, end) = file.read_via_stream(0);
    let content = stream.collect().await;
    end.await.map(|()| content)
}

fn answer(result: Result<Vec<u8>, ErrorCode>) -> Response {
    match result {
        Ok(content) => text(200, &String::from_utf8_lossy(&content)),
        Err(error) => text(404, &format!("{error:?}\n")),
    }
}

fn root() -> Option<Descriptor> {
    get_directories().into_iter().next().map(|(root, _)| root)
}

fn path(query: &str) -> String {
    query.strip_prefix("path=").unwrap_or_default().to_owned()
}
