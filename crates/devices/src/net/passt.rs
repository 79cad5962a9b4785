//! User-mode network by the helper program passt: one stream socket, each frame after its length (4 bytes, big-endian).
//!
//! passt ends by itself when its socket closes, however this process ends. A parent-death signal would not do: the kernel drops
//! it when passt changes its user from root to nobody. What passt says on its error output is kept in memory and goes into the
//! error when it ends.
//!
//! Checksums that the guest left blank are completed here. Long TCP packets go as they are: passt makes a stream of bytes of them, and
//! its own MTU is 65520. In the other direction its frames come through memory of this host, from the process that made their
//! checksums, so that a guest is told that these are right, as a card says it that has looked; and segments that came together reach
//! a guest that takes long packets as one.

use std::fs::File;
use std::io::{self, IoSlice, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use abi::virtio::net::{HDR_F_DATA_VALID, HEADER_BYTES, Header};
use frames::checksum;
use frames::merge::LongPacket;
use frames::{MAX_FRAME, MIN_FRAME, Offloads};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendFlags, send, sockopt};
use zerocopy::{FromBytes, IntoBytes};

use super::{Forward, NetBackend, NetError};

/// Bytes of the length before each frame.
const LENGTH_BYTES: usize = 4;
/// Longest frame that passt takes; a longer one ends the connection (`L2_MAX_LEN_PASST` in its `tap.h`).
const MAX_SENT: usize = 65535;
/// What is read from the socket at once.
const RECEIVE_BYTES: usize = 256 << 10;
/// What may wait in the socket, each way.
const SOCKET_BYTES: usize = 4 << 20;
/// How long passt may take to be ready.
const START_TIME: Duration = Duration::from_secs(2);
/// How often to look whether it is.
const START_STEP: Duration = Duration::from_millis(2);

/// A running passt.
pub struct Passt {
    socket: UnixStream,
    process: Option<Process>,
    received: Box<[u8]>,
    /// Bytes of `received` that are not handed out yet.
    start: usize,
    end: usize,
    /// The rest of a frame that the socket took in part.
    unsent: Vec<u8>,
    unsent_start: usize,
    /// What is left to the guest.
    offloads: Offloads,
}

struct Process {
    child: Child,
    messages: File,
}

impl Passt {
    /// Starts passt and waits until it is ready.
    ///
    /// # Errors
    /// [`NetError`] with what passt says.
    pub fn start(forwards: &[Forward]) -> Result<Passt, NetError> {
        let mut arguments = Vec::new();
        for forward in forwards {
            check_free(forward)?;
            arguments.push(if forward.udp { "--udp-ports".into() } else { "--tcp-ports".into() });
            arguments.push(format!("{}:{}", forward.host, forward.guest));
        }
        Passt::start_program("passt", &arguments)
    }

    /// Process id of passt.
    #[cfg(test)]
    pub(crate) fn process_id(&self) -> Option<u32> {
        self.process.as_ref().map(|process| process.child.id())
    }

    fn start_program(program: &str, arguments: &[String]) -> Result<Passt, NetError> {
        let (ours, theirs) = UnixStream::pair()?;
        widen(&ours);
        widen(&theirs);
        let messages = File::from(memfd_create("passt-messages", MemfdFlags::CLOEXEC).map_err(io::Error::from)?);
        let mut command = Command::new(program);
        // The socket is its standard input. In the foreground, it stays our child and says what is wrong.
        command.args(["--foreground", "--quiet", "--fd", "0"]);
        command.args(arguments).stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(messages.try_clone()?);
        let child = command.spawn().map_err(NetError::NoPasst)?;
        // Its end of the socket has to be closed here, or its death would go unnoticed.
        drop(command);
        let mut process = Process { child, messages };
        process.wait_ready()?;
        Passt::over(ours, Some(process)).map_err(NetError::Host)
    }

    fn over(socket: UnixStream, process: Option<Process>) -> io::Result<Passt> {
        socket.set_nonblocking(true)?;
        let received = vec![0; RECEIVE_BYTES].into_boxed_slice();
        let (start, end, unsent, unsent_start) = (0, 0, Vec::new(), 0);
        Ok(Passt { socket, process, received, start, end, unsent, unsent_start, offloads: Offloads::default() })
    }

    fn send_rest(&mut self) -> io::Result<()> {
        while self.unsent_start < self.unsent.len() {
            self.unsent_start += send(&self.socket, &self.unsent[self.unsent_start..], SendFlags::NOSIGNAL)?;
        }
        self.unsent.clear();
        self.unsent_start = 0;
        Ok(())
    }

    /// Where the frame at `start` is, if all of it is there.
    fn whole_frame(&self) -> io::Result<Option<Range<usize>>> {
        let waiting = &self.received[self.start..self.end];
        let Some(length) = waiting.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if !(MIN_FRAME..=MAX_FRAME).contains(&length) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("passt sent a frame of {length} bytes")));
        }
        let from = self.start + LENGTH_BYTES;
        Ok((waiting.len() >= LENGTH_BYTES + length).then_some(from..from + length))
    }

    /// Makes a packet of the frame at `first`, and of what follows and belongs to it; its length.
    fn hand_out(&mut self, first: Range<usize>, packet: &mut [u8]) -> usize {
        let (head, room) = packet.split_at_mut(HEADER_BYTES);
        let mut length = first.len();
        room[..length].copy_from_slice(&self.received[first.clone()]);
        self.start = first.end;
        let mut header = Header::default();
        if self.offloads.checksum && checksum::place(&room[..length]).is_some() {
            header.flags = HDR_F_DATA_VALID;
        }
        if let Some(mut long) = LongPacket::begin(room, length, self.offloads) {
            // A length that is impossible is found when it is that frame's turn.
            while let Ok(Some(next)) = self.whole_frame()
                && long.push(&self.received[next.clone()])
            {
                self.start = next.end;
            }
            length = long.frame_length();
            header = long.finish().unwrap_or(header);
        }
        head.copy_from_slice(header.as_bytes());
        HEADER_BYTES + length
    }

    fn ended(&mut self) -> io::Error {
        let text = self.process.as_mut().map(Process::last_words).unwrap_or_default();
        io::Error::new(io::ErrorKind::BrokenPipe, format!("passt ended: {text}"))
    }
}

impl NetBackend for Passt {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        let (header, frame) = Header::read_from_prefix(packet).map_err(|_| io::ErrorKind::InvalidInput)?;
        if !(MIN_FRAME..=MAX_SENT).contains(&frame.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let length = (frame.len() as u32).to_be_bytes();
        let blank = checksum::left_blank(&header, frame).map_err(|_| io::ErrorKind::InvalidInput)?;
        let (at, bytes) = blank.as_ref().map_or((frame.len(), [].as_slice()), |(at, bytes)| (*at, bytes.as_slice()));
        let pieces = [&length, &frame[..at], bytes, &frame[at + bytes.len()..]];
        let sent = self.send_rest().and_then(|()| {
            loop {
                match (&self.socket).write_vectored(&pieces.map(IoSlice::new)) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    result => break result,
                }
            }
        });
        match sent {
            Ok(mut sent) => {
                for piece in pieces {
                    let (gone, rest) = piece.split_at(sent.min(piece.len()));
                    sent -= gone.len();
                    self.unsent.extend_from_slice(rest);
                }
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            Err(_) => Err(self.ended()),
        }
    }

    fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    fn send_unsent(&mut self) -> io::Result<()> {
        match self.send_rest() {
            Err(error) if !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Err(self.ended()),
            result => result,
        }
    }

    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            if let Some(first) = self.whole_frame()? {
                return Ok(Some(self.hand_out(first, packet)));
            }
            self.received.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            match (&self.socket).read(&mut self.received[self.end..]) {
                Ok(0) => return Err(self.ended()),
                Ok(len) => self.end += len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(self.ended()),
            }
        }
    }

    fn set_guest_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.offloads = offloads;
        Ok(())
    }
}

/// Makes room for frames that wait in the socket: passt drops what does not fit, and the guest's TCP pays for it. Without the
/// right to go beyond the host's limit (net.core.wmem_max), the limit has to do.
fn widen(socket: &UnixStream) {
    if sockopt::set_socket_send_buffer_size_force(socket, SOCKET_BYTES).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, SOCKET_BYTES);
    }
}

/// passt goes on without a port that somebody else has, and says nothing.
fn check_free(forward: &Forward) -> Result<(), NetError> {
    let address = ("0.0.0.0", forward.host);
    let bound = if forward.udp { UdpSocket::bind(address).map(drop) } else { TcpListener::bind(address).map(drop) };
    bound.map_err(|source| NetError::Forward { port: forward.host, source })
}

impl Process {
    /// passt is ready when it has locked itself in by seccomp, the last thing it does before it looks at its socket.
    fn wait_ready(&mut self) -> Result<(), NetError> {
        let status = format!("/proc/{}/status", self.child.id());
        let end = Instant::now() + START_TIME;
        while Instant::now() < end {
            if self.child.try_wait()?.is_some() {
                return Err(NetError::Passt(self.last_words()));
            }
            if std::fs::read_to_string(&status).is_ok_and(|status| status.contains("Seccomp:\t2")) {
                return Ok(());
            }
            std::thread::sleep(START_STEP);
        }
        // A kernel without seccomp: whatever goes wrong shows when frames are to be moved.
        Ok(())
    }

    /// What passt said, without what it says to everybody.
    fn last_words(&mut self) -> String {
        let mut text = Vec::new();
        let read = self.messages.seek(SeekFrom::Start(0)).and_then(|_| (&self.messages).take(16 << 10).read_to_end(&mut text));
        let text = if read.is_ok() { String::from_utf8_lossy(&text).into_owned() } else { String::new() };
        let noise = ["Failed to send ", "Don't run as root", "Usage:"];
        let lines: Vec<&str> =
            text.lines().filter(|line| !line.trim().is_empty() && !noise.iter().any(|start| line.starts_with(start))).collect();
        match lines.as_slice() {
            [] => "it says nothing".into(),
            lines => lines[..lines.len().min(3)].join("; "),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill, and only its status to be fetched.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use abi::virtio::net::{GSO_TCPV4, HDR_F_NEEDS_CSUM};
    use frames::MAX_PACKET;

    use super::*;

    fn pair() -> (Passt, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Passt::over(ours, None).unwrap(), theirs)
    }

    fn packet(len: usize, byte: u8) -> Vec<u8> {
        [vec![0; HEADER_BYTES], vec![byte; len]].concat()
    }

    #[test]
    fn frames_in_pieces_come_out_whole() {
        let (mut passt, mut other) = pair();
        let mut stream = Vec::new();
        for (len, byte) in [(60, 1u8), (1514, 2), (65534, 3)] {
            stream.extend_from_slice(&(len as u32).to_be_bytes());
            stream.extend_from_slice(&vec![byte; len]);
        }
        let mut room = vec![0; MAX_PACKET];
        let mut got = Vec::new();
        for piece in stream.chunks(999) {
            other.write_all(piece).unwrap();
            while let Some(len) = passt.receive(&mut room).unwrap() {
                got.push((len - HEADER_BYTES, room[HEADER_BYTES], room[len - 1]));
            }
        }
        assert_eq!(got, [(60, 1, 1), (1514, 2, 2), (65534, 3, 3)]);
    }

    #[test]
    fn a_full_socket_keeps_frames_whole_and_in_order() {
        let (mut passt, mut other) = pair();
        let mut sent = 0u32;
        while passt.send(&packet(1000 + sent as usize, sent as u8)).is_ok() {
            sent += 1;
            assert!(sent < 100_000);
        }
        let mut received = 0;
        while received < sent {
            let mut length = [0; 4];
            other.read_exact(&mut length).unwrap();
            let mut frame = vec![0; u32::from_be_bytes(length) as usize];
            // The rest of the last frame goes out as soon as there is room.
            let _ = passt.send_unsent();
            other.read_exact(&mut frame).unwrap();
            assert_eq!(frame, vec![received as u8; 1000 + received as usize]);
            received += 1;
        }
    }

    #[test]
    fn impossible_lengths_end_the_connection() {
        for length in [0u32, 13, MAX_FRAME as u32 + 1, u32::MAX] {
            let (mut passt, mut other) = pair();
            other.write_all(&length.to_be_bytes()).unwrap();
            assert_eq!(passt.receive(&mut vec![0; MAX_PACKET]).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    /// A frame of a TCP connection with `data`, from there on in its stream.
    fn segment(at: u32, data: &[u8]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([8, 0, 0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0, 80, 0, 81]);
        frame.extend(at.to_be_bytes());
        frame.extend([0, 0, 0, 9, 0x50, 16, 1, 0, 0, 0, 0, 0]);
        frame.extend(data);
        checksum::set_length(&mut frame).unwrap();
        let place = checksum::place(&frame).unwrap();
        checksum::prepare(&mut frame, place).unwrap();
        checksum::complete(&mut frame, place);
        frame
    }

    #[test]
    fn blank_checksums_are_completed() {
        let (mut passt, mut other) = pair();
        let whole = segment(1, &[7; 3001]);
        let mut blank = whole.clone();
        let place = checksum::place(&blank).unwrap();
        checksum::prepare(&mut blank, place).unwrap();
        let header = Header {
            flags: HDR_F_NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            gso_size: 1460.into(),
            csum_start: place.start.into(),
            csum_offset: place.offset.into(),
            ..Header::default()
        };
        passt.send(&[header.as_bytes(), &blank].concat()).unwrap();
        let mut got = vec![0; LENGTH_BYTES + whole.len()];
        other.read_exact(&mut got).unwrap();
        assert_eq!(got[LENGTH_BYTES..], whole);
        // What no header may say, and what passt would not take, is that packet's loss.
        let wild = Header { csum_start: 4000.into(), ..header };
        let too_long = packet(MAX_SENT + 1, 0);
        for bad in [[wild.as_bytes(), &blank].concat(), too_long, vec![0; 5]] {
            assert_eq!(passt.send(&bad).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        assert!(!passt.has_unsent());
    }

    #[test]
    fn segments_that_came_together_are_one_packet_for_who_takes_it() {
        let segments = [0, 1, 2].map(|n| segment(n * 1000, &[n as u8; 1000]));
        for (offloads, lengths, flags) in [
            (Offloads::default(), vec![1054; 3], 0),
            (Offloads { checksum: true, ..Offloads::default() }, vec![1054; 3], HDR_F_DATA_VALID),
            (Offloads { checksum: true, tso4: true, tso6: true }, vec![3054], HDR_F_NEEDS_CSUM),
        ] {
            let (mut passt, mut other) = pair();
            passt.set_guest_offloads(offloads).unwrap();
            for segment in &segments {
                other.write_all(&[&(segment.len() as u32).to_be_bytes(), segment.as_slice()].concat()).unwrap();
            }
            let mut room = vec![0; MAX_PACKET];
            for length in lengths {
                assert_eq!(passt.receive(&mut room).unwrap(), Some(HEADER_BYTES + length));
                assert_eq!(room[0], flags);
            }
            assert_eq!(passt.receive(&mut room).unwrap(), None);
        }
    }

    #[test]
    fn a_missing_passt_says_how_to_get_it() {
        let error = Passt::start_program("/nonexistent/passt", &[]).err().unwrap().to_string();
        assert!(error.contains("apt install passt"), "{error}");
    }

    #[test]
    fn a_passt_that_refuses_is_quoted() {
        if Command::new("passt").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            return;
        }
        let error = Passt::start_program("passt", &["--tcp-ports".into(), "99999".into()]).err().unwrap().to_string();
        assert!(error.starts_with("passt does not start: ") && error.len() > 24 && !error.contains("Failed to send"), "{error}");
    }

    #[test]
    fn a_port_that_is_taken_is_told() {
        let taken = TcpListener::bind("0.0.0.0:0").unwrap();
        let host = taken.local_addr().unwrap().port();
        let error = Passt::start(&[Forward { udp: false, host, guest: 22 }]).err().unwrap().to_string();
        assert!(error.contains(&format!("port {host} of the host")), "{error}");
    }
}
