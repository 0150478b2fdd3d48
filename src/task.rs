//! The task service: one method a verb, each decodes, asks or tells the supervisor, encodes.
//!
//! The same handlers answer as `containerd.task.v2.Task` (containerd 1.x, and 2.x for shims of version 2) and
//! `containerd.task.v3.Task`. What only reads (State, Wait, Pids, Connect, Stats) goes through a container's [`Handle`]
//! and never waits for an actor.

use std::path::Path;
use std::sync::Arc;

use actix::Addr;
use async_trait::async_trait;
use containerd_shim::util::convert_to_any;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::Result;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;
use tokio::sync::oneshot;
use troupe_actors::{
    AddExec, Blueprint, ContainerId, Create, Delete, DeleteExec, Error, ExecPids, Find, FindExec, Handle, Images, Kill,
    KillExec, Mount, Pass, Pause, Phase, Resume, Settings, Start, StartExec, StdioPaths, Supervisor, Update,
};

use crate::events::timestamp;
use crate::logging::Sinks;
use crate::metrics;
use crate::runc_options;
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
        let id = self.id(ctx, id);
        match exec_id {
            "" => self.ask(Find(id)).await,
            exec => self.ask(Pass { id, message: FindExec(exec.to_owned()) }).await,
        }
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
            runc: runc_options::of_request(request.options.as_ref()),
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
            return Err(unimplemented("a container cannot be restored from a checkpoint"));
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
        let id = self.id(ctx, &request.id);
        let pid = match request.exec_id.as_str() {
            "" => self.ask(Start(id)).await?,
            exec => self.ask(Pass { id, message: StartExec(exec.to_owned()) }).await?,
        };
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn kill(&self, ctx: &TtrpcContext, request: KillRequest) -> Result<Empty> {
        let (id, signal, all) = (self.id(ctx, &request.id), request.signal, request.all);
        if !request.exec_id.is_empty() {
            self.ask(Pass { id, message: KillExec { exec: request.exec_id, signal } }).await?;
            return Ok(Empty::new());
        }
        let (reply, answer) = oneshot::channel();
        self.supervisor.do_send(Kill { id, signal, all, reply });
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
        let id = self.id(ctx, &request.id);
        let (pid, exit) = match request.exec_id.as_str() {
            "" => {
                let handle = self.ask(Find(id)).await?;
                let exit = self.ask(Delete(handle.id)).await?;
                self.log.detach(&handle.bundle);
                (handle.pid, exit)
            }
            exec => self.ask(Pass { id, message: DeleteExec(exec.to_owned()) }).await?,
        };
        Ok(DeleteResponse {
            pid,
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
            Phase::Paused => Status::PAUSED,
            Phase::Stopped(_) => Status::STOPPED,
        };
        Ok(StateResponse {
            id: if request.exec_id.is_empty() { request.id } else { request.exec_id.clone() },
            exec_id: request.exec_id,
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

    /// Of a guest one process, the anchor: an empty list is a leaked task to containerd 1.7–2.2.
    async fn pids(&self, ctx: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        let pids = self.find(ctx, &request.id, "").await?.processes().await.map_err(to_ttrpc)?;
        let mut execs = self.ask(Pass { id: self.id(ctx, &request.id), message: ExecPids }).await?;
        let process =
            |pid| ProcessInfo { pid, info: execs.remove(&pid).and_then(details).into(), ..Default::default() };
        let processes = pids.into_iter().map(process).collect();
        Ok(PidsResponse { processes, ..Default::default() })
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
        let measured = self.find(ctx, &request.id, "").await?.measure().await.map_err(to_ttrpc)?;
        let encoded = metrics::encode(&measured, self.cgroup_v2);
        let stats = encoded.map_err(|e| to_ttrpc(Error::Internal(format!("encode the statistics: {e}"))))?;
        Ok(StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    /// Sent after every delete. The daemon leaves by itself when nothing has been left for a while.
    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Result<Empty> {
        Ok(Empty::new())
    }

    async fn exec(&self, ctx: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        let stdio = StdioPaths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let process = request.spec.into_option().unwrap_or_default().value;
        let message = AddExec { exec: request.exec_id, process, stdio };
        self.ask(Pass { id: self.id(ctx, &request.id), message }).await?;
        Ok(Empty::new())
    }

    async fn pause(&self, ctx: &TtrpcContext, request: PauseRequest) -> Result<Empty> {
        self.ask(Pass { id: self.id(ctx, &request.id), message: Pause }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, ctx: &TtrpcContext, request: ResumeRequest) -> Result<Empty> {
        self.ask(Pass { id: self.id(ctx, &request.id), message: Resume }).await?;
        Ok(Empty::new())
    }

    async fn update(&self, ctx: &TtrpcContext, request: UpdateTaskRequest) -> Result<Empty> {
        let handle = self.find(ctx, &request.id, "").await?;
        let text = request.resources.into_option().unwrap_or_default().value;
        if let Some(updated) = handle.update_native(&text).await {
            return updated.map(|()| Empty::new()).map_err(to_ttrpc);
        }
        let id = handle.id;
        let resources = serde_json::from_slice(&text)
            .map_err(|e| to_ttrpc(Error::invalid(format!("container {id}: the resources of an update: {e}"))))?;
        self.ask(Update { id, resources }).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, ctx: &TtrpcContext, request: ResizePtyRequest) -> Result<Empty> {
        let handle = self.find(ctx, &request.id, &request.exec_id).await?;
        let side = |cells: u32| u16::try_from(cells).unwrap_or(u16::MAX);
        handle.resize(side(request.width), side(request.height)).map_err(to_ttrpc)?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Result<Empty> {
        Err(unimplemented("a container cannot be checkpointed"))
    }
}

/// Tells an exec from the other processes, in the message of runc's shim. What cannot be encoded is left out.
fn details(exec_id: String) -> Option<Any> {
    convert_to_any(Box::new(ProcessDetails { exec_id, ..Default::default() })).ok()
}
