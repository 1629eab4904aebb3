//! A thread that owns a connection, and the transaction that calls share.

use std::sync::mpsc;
use std::thread::JoinHandle;

use rusqlite::Connection;
use tokio::sync::oneshot;

use crate::store::{Result, StoreError};

/// Calls that share one transaction at most: bounds how long the first of them waits.
const GROUP: usize = 64;

/// What a worker's thread is given to do.
pub(super) enum Command {
    /// Runs in the transaction that the waiting calls share.
    Write(Box<dyn Grouped>),
    /// Runs outside of any transaction.
    Alone(Box<dyn FnOnce(&mut Connection) + Send>),
}

/// A call in a shared transaction: it runs, and is answered once the transaction has ended.
pub(super) trait Grouped: Send {
    fn run(&mut self, connection: &Connection);
    fn answer(self: Box<Self>, committed: Result<()>);
}

/// A call and the way to its caller.
pub(super) struct Call<T, F> {
    work: Option<F>,
    done: Option<Result<T>>,
    tell: oneshot::Sender<Result<T>>,
}

impl<T, F> Call<T, F>
where
    T: Send + 'static,
    F: FnOnce(&Connection) -> Result<T> + Send + 'static,
{
    /// A call of `work`, and where its answer comes.
    pub(super) fn with_answer(work: F) -> (Box<dyn Grouped>, oneshot::Receiver<Result<T>>) {
        let (tell, told) = oneshot::channel();
        let call = Call { work: Some(work), done: None, tell };
        (Box::new(call), told)
    }
}

impl<T, F> Grouped for Call<T, F>
where
    T: Send + 'static,
    F: FnOnce(&Connection) -> Result<T> + Send + 'static,
{
    fn run(&mut self, connection: &Connection) {
        self.done = self.work.take().map(|work| in_savepoint(connection, work));
    }

    fn answer(self: Box<Self>, committed: Result<()>) {
        let done = self.done.unwrap_or_else(|| Err(gone()));
        // A caller that has gone wants no answer.
        let _ = self.tell.send(committed.and(done));
    }
}

/// Runs `work` so that its failure undoes what it did and nothing else.
fn in_savepoint<T>(connection: &Connection, work: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
    connection.prepare_cached("savepoint call")?.execute([])?;
    let done = work(connection);
    if done.is_err() {
        connection.prepare_cached("rollback to call")?.execute([])?;
    }
    connection.prepare_cached("release call")?.execute([])?;
    done
}

/// The thread and the way to it. Dropping it waits for what was sent, and closes the connection.
pub(super) struct Worker {
    commands: Option<mpsc::Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread.
    pub(super) fn start(name: &str, connection: Connection) -> std::io::Result<Worker> {
        let (commands, given) = mpsc::channel();
        let thread =
            std::thread::Builder::new().name(name.to_owned()).spawn(move || run(connection, &given))?;
        Ok(Worker { commands: Some(commands), thread: Some(thread) })
    }

    pub(super) fn send(&self, command: Command) -> Result<()> {
        let commands = self.commands.as_ref().ok_or_else(gone)?;
        commands.send(command).map_err(|_| gone())
    }

    /// Runs `work` outside of any transaction.
    pub(super) async fn alone<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (tell, told) = oneshot::channel();
        let work = move |connection: &mut Connection| {
            // A caller that has gone wants no answer.
            let _ = tell.send(work(connection));
        };
        self.send(Command::Alone(Box::new(work)))?;
        told.await.map_err(|_| gone())?
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread of the store has failed");
        }
    }
}

/// The error of a call whose thread has ended.
pub(super) fn gone() -> StoreError {
    StoreError::Internal("the thread of the store has ended".to_owned())
}

fn run(mut connection: Connection, commands: &mpsc::Receiver<Command>) {
    let mut next = None;
    while let Some(command) = next.take().or_else(|| commands.recv().ok()) {
        match command {
            Command::Alone(work) => work(&mut connection),
            Command::Write(call) => next = group(&connection, call, commands),
        }
    }
}

/// Runs `first` and the calls that wait behind it in one transaction; returns a command that does not belong to it.
fn group(
    connection: &Connection,
    first: Box<dyn Grouped>,
    commands: &mpsc::Receiver<Command>,
) -> Option<Command> {
    if let Err(error) = connection.execute_batch("begin immediate") {
        first.answer(Err(error.into()));
        return None;
    }
    let mut calls = vec![first];
    let mut next = None;
    let mut at = 0;
    while let Some(call) = calls.get_mut(at) {
        call.run(connection);
        at += 1;
        if at < GROUP {
            match commands.try_recv() {
                Ok(Command::Write(call)) => calls.push(call),
                Ok(other) => next = Some(other),
                Err(_) => {}
            }
        }
    }
    let committed = connection.execute_batch("commit").map_err(StoreError::from);
    if committed.is_err() && !connection.is_autocommit() {
        // The transaction is still open, for example on a full disk; the next one must not join it.
        if let Err(error) = connection.execute_batch("rollback") {
            tracing::error!("the store could not roll back: {error}");
        }
    }
    for call in calls {
        call.answer(committed.clone());
    }
    next
}
