//! One HTTP/1.1 connection. Nothing runs beside it: whoever waits for an answer drives the
//! connection meanwhile, which saves a task and its wake-ups for every request, and dropping the wait
//! closes the socket at once.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body as _, Frame, Incoming};
use hyper::client::conn::{TrySendError, http1};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::budget::Permit;

/// The body of a request.
pub(super) type Body = Full<Bytes>;

/// No larger head is read. Twice of what Node.js takes as a client (16 KiB); the library's buffer is up to half
/// as large again, for each connection whose receiver sends heads without end.
pub(super) const HEAD_MAX: usize = 32 * 1024;

/// A connection that requests can be sent on, one after the other.
pub(super) struct Connection {
    sender: http1::SendRequest<Body>,
    /// `None` once the connection has ended.
    driver: Option<Box<http1::Connection<TokioIo<Stream>, Body>>>,
    /// After the socket, so that it is given back only once that is closed.
    _permit: Arc<Permit>,
}

impl Connection {
    pub(super) async fn open(stream: Stream, permit: Arc<Permit>) -> Result<Connection, hyper::Error> {
        let (sender, driver) =
            http1::Builder::new().max_buf_size(HEAD_MAX).handshake(TokioIo::new(stream)).await?;
        Ok(Connection { sender, driver: Some(Box::new(driver)), _permit: permit })
    }

    /// Lets the connection do what it can now.
    fn drive(&mut self, context: &mut Context<'_>) {
        if let Some(driver) = &mut self.driver
            && Pin::new(driver).poll(context).is_ready()
        {
            // Whoever waits for an answer has been told why, or learns of the end by this drop.
            self.driver = None;
        }
    }

    /// Whether a request may be sent on it, as far as can be known: notices what the other side did
    /// while the connection lay idle.
    pub(super) fn is_usable(&mut self) -> bool {
        // Nobody waits for it: whoever uses it next drives it with a waker of its own.
        self.drive(&mut Context::from_waker(Waker::noop()));
        self.is_ready()
    }

    /// Sends a request and waits for the head of its answer. The error holds the request when
    /// nothing of it was written.
    pub(super) async fn send(
        &mut self,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Body>>> {
        let mut answer = pin!(self.sender.try_send_request(request));
        poll_fn(|context| {
            self.drive(context);
            answer.as_mut().poll(context)
        })
        .await
    }

    /// The next frame of the answer's body; `None` at its end.
    pub(super) async fn read(&mut self, body: &mut Incoming) -> Option<Result<Frame<Bytes>, hyper::Error>> {
        poll_fn(|context| {
            if let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(context) {
                return Poll::Ready(frame);
            }
            self.drive(context);
            Pin::new(&mut *body).poll_frame(context)
        })
        .await
    }

    /// Whether the last answer was read to its end and the next request may follow.
    pub(super) fn is_ready(&self) -> bool {
        self.driver.is_some() && self.sender.is_ready()
    }
}

/// What a connection runs over.
pub(super) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
