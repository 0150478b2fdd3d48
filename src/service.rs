//! Stand-in until the service is written: says that it is ready and waits to be killed.

use crate::launch::ServeParams;

pub fn serve(params: ServeParams) -> anyhow::Result<()> {
    let ServeParams { listener, ready, args: _ } = params;
    ready.ok();
    loop {
        std::thread::park();
        let _ = &listener;
    }
}
