//! The task service: one method a verb, each decodes, asks or tells the supervisor, encodes.
//!
//! The same handlers answer as `containerd.task.v2.Task` (containerd 1.x, and 2.x for shims of version 2) and
//! `containerd.task.v3.Task`. What only reads (State, Wait, Pids, Connect, Stats) goes through a container's [`Handle`]
//! and never waits for an actor.

use std::path::Path;
use std::sync::Arc;

use actix::Addr;
use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;
use containerd_shim_protos::ttrpc::{self, Result};
use tokio::sync::oneshot;
use troupe_actors::{
    Blueprint, ContainerId, Create, Delete, Error, Find, Handle, Images, Kill, Mount, Phase, Settings, Start,
    StdioPaths, Supervisor, Update,
};

use crate::events::timestamp;
use crate::logging::Sinks;
use crate::metrics;
use crate::status::{to_ttrpc, unimplemented};

/// Names the containerd namespace of a call.
const NAMESPACE: &str = "containerd-namespace-ttrpc";

/// The service.
#[derive(Clone)]
pub struct TaskService {
    pub supervisor: Addr<Supervisor>,
    /// Namespace of a call that names none.
    pub namespace: String,
    pub settings: Arc<Settings>,
    pub images: Arc<dyn Images>,
    pub log: Sinks,
    pub cgroup_v2: bool,
}

impl TaskService {
    fn id(&self, ctx: &TtrpcContext, id: &str) -> ContainerId {
        let named = ctx.metadata.get(NAMESPACE).and_then(|values| values.first());
        ContainerId::new(named.map_or(self.namespace.as_str(), String::as_str), id)
    }

    async fn find(&self, ctx: &TtrpcContext, id: &str, exec_id: &str) -> Result<Handle> {
        no_exec(exec_id)?;
        self.ask(Find(self.id(ctx, id))).await
    }

    fn blueprint(&self, request: &CreateTaskRequest) -> Blueprint {
        let mount = |mount: &containerd_shim_protos::api::Mount| Mount {
            kind: mount.type_.clone(),
            source: mount.source.clone(),
            options: mount.options.clone(),
        };
        Blueprint {
            bundle: request.bundle.clone().into(),
            rootfs: request.rootfs.iter().map(mount).collect(),
            stdio: StdioPaths {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
            },
            settings: Arc::clone(&self.settings),
            images: Arc::clone(&self.images),
        }
    }

    async fn ask<M, T>(&self, message: M) -> Result<T>
    where
        M: actix::Message<Result = troupe_actors::Result<T>> + Send + 'static,
        Supervisor: actix::Handler<M>,
        T: Send + 'static,
    {
        self.supervisor.send(message).await.map_err(Error::from).flatten().map_err(to_ttrpc)
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, ctx: &TtrpcContext, request: CreateTaskRequest) -> Result<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(unimplemented("a wasm container cannot be restored from a checkpoint"));
        }
        let bundle = Path::new(&request.bundle);
        self.log.attach(bundle);
        let id = self.id(ctx, &request.id);
        let created = self.ask(Create { id, blueprint: self.blueprint(&request) }).await;
        if created.is_err() {
            self.log.detach(bundle);
        }
        Ok(CreateTaskResponse { pid: created?.pid, ..Default::default() })
    }

    async fn start(&self, ctx: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        no_exec(&request.exec_id)?;
        let pid = self.ask(Start(self.id(ctx, &request.id))).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn kill(&self, ctx: &TtrpcContext, request: KillRequest) -> Result<Empty> {
        no_exec(&request.exec_id)?;
        let (reply, answer) = oneshot::channel();
        self.supervisor.do_send(Kill { id: self.id(ctx, &request.id), signal: request.signal, reply });
        let answer = answer.await.unwrap_or_else(|_| Err(Error::Internal("a kill was lost".into())));
        answer.map(|()| Empty::new()).map_err(to_ttrpc)
    }

    async fn wait(&self, ctx: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        let exit = self.find(ctx, &request.id, &request.exec_id).await?.wait().await.map_err(to_ttrpc)?;
        Ok(WaitResponse {
            exit_status: exit.code,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn delete(&self, ctx: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let handle = self.find(ctx, &request.id, &request.exec_id).await?;
        let exit = self.ask(Delete(handle.id)).await?;
        self.log.detach(&handle.bundle);
        Ok(DeleteResponse {
            pid: handle.pid,
            exit_status: exit.code,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn state(&self, ctx: &TtrpcContext, request: StateRequest) -> Result<StateResponse> {
        let handle = self.find(ctx, &request.id, &request.exec_id).await?;
        let phase = handle.phase();
        let status = match phase {
            Phase::Created => Status::CREATED,
            Phase::Running => Status::RUNNING,
            Phase::Stopped(_) => Status::STOPPED,
        };
        Ok(StateResponse {
            id: request.id,
            bundle: handle.bundle.display().to_string(),
            pid: handle.pid,
            status: status.into(),
            stdin: handle.stdio.stdin,
            stdout: handle.stdio.stdout,
            stderr: handle.stdio.stderr,
            terminal: handle.stdio.terminal,
            exit_status: phase.exit().map_or(0, |exit| exit.code),
            exited_at: phase.exit().map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    /// One process, the anchor: an empty list is a leaked task to containerd 1.7–2.2.
    async fn pids(&self, ctx: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        let handle = self.find(ctx, &request.id, "").await?;
        let process = ProcessInfo { pid: handle.pid, ..Default::default() };
        Ok(PidsResponse { processes: vec![process], ..Default::default() })
    }

    async fn connect(&self, ctx: &TtrpcContext, request: ConnectRequest) -> Result<ConnectResponse> {
        let handle = self.find(ctx, &request.id, "").await?;
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid: handle.pid, ..Default::default() })
    }

    async fn close_io(&self, ctx: &TtrpcContext, request: CloseIORequest) -> Result<Empty> {
        let handle = self.find(ctx, &request.id, &request.exec_id).await?;
        if request.stdin {
            handle.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn stats(&self, ctx: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        let usage = self.find(ctx, &request.id, "").await?.usage();
        let encoded = metrics::encode(&usage, self.cgroup_v2);
        let stats = encoded.map_err(|e| to_ttrpc(Error::Internal(format!("encode the statistics: {e}"))))?;
        Ok(StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    /// Sent after every delete. The daemon leaves by itself when nothing has been left for a while.
    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Result<Empty> {
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, _: ExecProcessRequest) -> Result<Empty> {
        Err(unimplemented("exec is not supported yet: a wasm container has no shell to execute"))
    }

    async fn pause(&self, _: &TtrpcContext, _: PauseRequest) -> Result<Empty> {
        Err(unimplemented("pause is not supported yet"))
    }

    async fn resume(&self, _: &TtrpcContext, _: ResumeRequest) -> Result<Empty> {
        Err(unimplemented("resume is not supported yet: no container can be paused"))
    }

    async fn update(&self, ctx: &TtrpcContext, request: UpdateTaskRequest) -> Result<Empty> {
        let id = self.id(ctx, &request.id);
        let text = request.resources.value.as_slice();
        let resources = serde_json::from_slice(text)
            .map_err(|e| to_ttrpc(Error::invalid(format!("container {id}: the resources of an update: {e}"))))?;
        self.ask(Update { id, resources }).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, _: ResizePtyRequest) -> Result<Empty> {
        Err(unimplemented("resize is not supported: WASI has no terminals"))
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Result<Empty> {
        Err(unimplemented("a wasm container cannot be checkpointed"))
    }
}

fn no_exec(exec_id: &str) -> Result<()> {
    match exec_id {
        "" => Ok(()),
        other => Err(ttrpc::error::get_rpc_status(ttrpc::Code::NOT_FOUND, format!("exec {other}: not found"))),
    }
}
