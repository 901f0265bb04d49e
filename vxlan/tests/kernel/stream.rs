use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use weft_vxlan::{Namespace, NetlinkError};

use crate::lab::{Net, eventually};

/// A TCP connection from station 1 to station 2 that is never idle.
pub(crate) struct Stream {
    received: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    ends: Vec<JoinHandle<()>>,
}

impl Stream {
    pub(crate) fn open(net: &Net, [from, to]: &[Namespace; 2]) -> Self {
        let (received, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let address = (net.ips(2)[0], 7777);
        let listener = to.run(|| Ok::<_, NetlinkError>(TcpListener::bind(address)?)).unwrap();
        let mut sender = from.run(|| Ok::<_, NetlinkError>(TcpStream::connect(address)?)).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&received));
        let send = move || {
            while !stopped.load(Ordering::Relaxed) {
                sender.write_all(&[7; 8 << 10]).unwrap();
            }
        };
        let receive = move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                match receiver.read(&mut buffer).unwrap() {
                    0 => return,
                    length => count.fetch_add(length as u64, Ordering::Relaxed),
                };
            }
        };
        Self { received, stop, ends: vec![thread::spawn(send), thread::spawn(receive)] }
    }

    pub(crate) async fn goes_on(&self) {
        let before = self.received.load(Ordering::Relaxed);
        eventually("the connection goes on", async || {
            let now = self.received.load(Ordering::Relaxed);
            if now > before + (4 << 20) { Ok(()) } else { Err(format!("{before} {now}")) }
        })
        .await;
    }

    pub(crate) fn close(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.ends.drain(..).for_each(|end| end.join().unwrap());
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
